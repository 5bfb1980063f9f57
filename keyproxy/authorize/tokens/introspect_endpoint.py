"""The introspection endpoint, RFC 7662, for confidential clients and for tokens of the admin API.

It shows access tokens as the proxy judges them. A refresh token is never active: a server that accepts active tokens
would otherwise accept one in place of an access token.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Final

from aiohttp import web

from keyproxy.auth.api_key import KeyFormat
from keyproxy.authorize.clients.authentication import ClientAuthentication, challenges, has_credential, two_methods
from keyproxy.authorize.endpoint import TOKEN, USER, Endpoint
from keyproxy.authorize.form import form_of
from keyproxy.authorize.rate_limits import Rate
from keyproxy.authorize.responses import json_response
from keyproxy.oauth.client import AuthMethod, ClientKind
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.store.directory.admin_tokens import AdminTokens
from keyproxy.store.oauth.token_values import AccessTokenState, TokenReader
from keyproxy.store.oauth.tokens import TokenStore

#: Any of these scopes of an admin token permits introspection.
_SCOPES: Final = frozenset({"tokens:read", "admin:read", "admin:write"})

_INACTIVE: Final = {"active": False}


class IntrospectEndpoint:
    """Shows a client its own access tokens, and an admin token all, or those of its tenant."""

    def __init__(
        self,
        tokens: TokenStore,
        authentication: ClientAuthentication,
        admin_tokens: AdminTokens,
        key_format: KeyFormat,
        *,
        issuer: str,
    ) -> None:
        self._tokens = tokens
        self._authentication = authentication
        self._admin_tokens = admin_tokens
        self._format = key_format
        self._issuer = issuer

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint as a value."""
        return Endpoint(
            "introspect",
            ("/oauth/introspect",),
            {"POST": self.handle},
            is_on_mtls=True,
            failures=Rate.FAILED_TOKEN_REQUESTS,
        )

    async def handle(self, request: web.Request) -> web.Response:
        """Handle a request. Raises OAuthError and StoreUnavailable."""
        form = await form_of(request)
        bearer = _bearer(request)
        if bearer is None:
            client = await self._authentication.authenticate(form, request)
            if client.kind is not ClientKind.REGISTERED or client.auth_method is AuthMethod.NONE:
                raise OAuthError(
                    "invalid_client",
                    "Only confidential clients may introspect tokens.",
                    status=401,
                    headers=challenges(is_basic="Authorization" in request.headers),
                )
            reader = TokenReader(client_row=client.row_id)
        elif has_credential(form):
            raise two_methods()
        else:
            reader = await self._reader(bearer, request)
        token = form.get("token")
        if token is None:
            raise OAuthError("invalid_request", "'token' is missing.")
        state = await self._tokens.introspect(token.encode("utf-8", "surrogateescape"), reader)
        if state is None:
            return json_response(200, _INACTIVE)
        request[USER] = state.user_id
        return json_response(200, self._content(state))

    async def _reader(self, bearer: str, request: web.Request) -> TokenReader:
        plaintext = bearer.encode("utf-8", "surrogateescape")
        token = None
        if self._format.may_be_admin_token(plaintext):
            token = await self._admin_tokens.presented(hashlib.sha256(plaintext).digest())
        if token is None or token["state"] != "active" or _SCOPES.isdisjoint(token["scopes"]):
            raise OAuthError(
                "invalid_token",
                "The admin token is invalid, or lacks the scope tokens:read.",
                status=401,
                headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
            )
        request[TOKEN] = token["id"]
        return TokenReader(tenant_id=token["tenant"])

    def _content(self, state: AccessTokenState) -> dict[str, object]:
        content: dict[str, object] = {
            "active": True,
            "scope": " ".join(state.scopes),
            "client_id": state.client_id,
            "sub": state.user_id,
            "iss": self._issuer,
            "aud": state.resource,
            "exp": int(state.expires_at.timestamp()),
            "iat": int(state.issued_at.timestamp()),
            "token_type": "Bearer",
        }
        if state.bound_to is not None:
            thumbprint = base64.urlsafe_b64encode(state.bound_to).rstrip(b"=").decode("ascii")
            content["cnf"] = {"x5t#S256": thumbprint}
        return content


def _bearer(request: web.Request) -> str | None:
    """The bearer token of a request, None if it shows another credential or none."""
    shown = request.headers.getall("Authorization", [])
    if len(shown) != 1:
        return None
    scheme, _, credential = shown[0].partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else None
