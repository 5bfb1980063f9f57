"""The token endpoint: a code, a refresh token or the client's own credential in exchange for tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

from aiohttp import web

from keyproxy.auth.api_key import KeyFormat
from keyproxy.authorize.clients.authentication import ClientAuthentication
from keyproxy.authorize.endpoint import GRANT_TYPE, PEER_CERTIFICATE, USER, Endpoint
from keyproxy.authorize.form import form_of
from keyproxy.authorize.rate_limits import Rate
from keyproxy.authorize.responses import json_response
from keyproxy.oauth import pkce
from keyproxy.oauth.client import AuthMethod, Client, ClientKind
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.signing.certificates import thumbprint
from keyproxy.store.oauth.token_values import CodeExchange, IssuedTokens, RefreshExchange, ServiceRequest
from keyproxy.store.oauth.tokens import TokenStore

AUTHORIZATION_CODE: Final = "authorization_code"
REFRESH_TOKEN: Final = "refresh_token"  # noqa: S105 - the name of a grant type
CLIENT_CREDENTIALS: Final = "client_credentials"

_Form: TypeAlias = Mapping[str, str]
_Exchange: TypeAlias = Callable[[Client, _Form, bytes | None], Awaitable[IssuedTokens]]


class TokenEndpoint:
    """Exchanges grants for tokens: RFC 6749 sections 4.1.3, 4.4.2 and 6, with PKCE alone."""

    def __init__(self, tokens: TokenStore, authentication: ClientAuthentication, key_format: KeyFormat) -> None:
        self._tokens = tokens
        self._authentication = authentication
        self._format = key_format
        self._exchanges: dict[str, _Exchange] = {
            AUTHORIZATION_CODE: self._redeem,
            REFRESH_TOKEN: self._refresh,
            CLIENT_CREDENTIALS: self._serve,
        }

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint as a value."""
        return Endpoint(
            "token",
            ("/oauth/token", "/token"),
            {"POST": self.handle},
            is_cross_origin=True,
            is_on_mtls=True,
            failures=Rate.FAILED_TOKEN_REQUESTS,
        )

    async def handle(self, request: web.Request) -> web.Response:
        """Handle a request. Raises OAuthError and StoreUnavailable."""
        form = await form_of(request)
        grant_type = _required(form, "grant_type")
        exchange = self._exchanges.get(grant_type)
        if exchange is None:
            raise OAuthError("unsupported_grant_type", f"The grant types are {', '.join(self._exchanges)}.")
        request[GRANT_TYPE] = grant_type
        client = await self._authentication.authenticate(form, request)
        issued = await exchange(client, form, _bound_to(request))
        request[USER] = issued.user_id
        return json_response(200, _content(issued))

    async def _redeem(self, client: Client, form: _Form, bound_to: bytes | None) -> IssuedTokens:
        code, verifier = _required(form, "code"), _required(form, "code_verifier")
        if not pkce.is_verifier(verifier):
            raise OAuthError("invalid_grant", "'code_verifier' must have 43 to 128 unreserved characters.")
        shown = CodeExchange(
            digest=_digest(code),
            challenge=_digest(verifier),
            redirect_uri=form.get("redirect_uri"),
            resource=form.get("resource"),
            bound_to=bound_to,
        )
        return await self._tokens.redeem(client, shown)

    async def _refresh(self, client: Client, form: _Form, bound_to: bytes | None) -> IssuedTokens:
        token = _required(form, "refresh_token").encode("utf-8", "surrogateescape")
        if not self._format.may_be_refresh_token(token):
            raise OAuthError("invalid_grant", "The refresh token is unknown.", detail="not a refresh token")
        shown = RefreshExchange(
            digest=hashlib.sha256(token).digest(),
            scopes=_scopes(form),
            resource=form.get("resource"),
            bound_to=bound_to,
        )
        return await self._tokens.refresh(client, shown)

    async def _serve(self, client: Client, form: _Form, bound_to: bytes | None) -> IssuedTokens:
        if client.kind is not ClientKind.REGISTERED or client.auth_method is AuthMethod.NONE:
            raise OAuthError("unauthorized_client", "The client has no credential and no grant to itself.")
        wish = ServiceRequest(scopes=_scopes(form), resource=form.get("resource"), bound_to=bound_to)
        return await self._tokens.client_credentials(client, wish)


def _bound_to(request: web.Request) -> bytes | None:
    """The thumbprint of the client's verified certificate, to which tokens are bound (RFC 8705); None without one."""
    certificate = request.get(PEER_CERTIFICATE)
    return None if certificate is None else thumbprint(certificate)


def _content(issued: IssuedTokens) -> dict[str, object]:
    content: dict[str, object] = {
        "access_token": issued.access_token.reveal().decode("ascii"),
        "token_type": "Bearer",
        "expires_in": issued.expires_in,
    }
    if issued.refresh_token is not None:
        content["refresh_token"] = issued.refresh_token.reveal().decode("ascii")
    if issued.scopes:
        content["scope"] = " ".join(issued.scopes)
    return content


def _required(form: _Form, name: str) -> str:
    value = form.get(name)
    if value is None:
        raise OAuthError("invalid_request", f"'{name}' is missing.")
    return value


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _scopes(form: _Form) -> frozenset[str] | None:
    text = form.get("scope")
    return None if text is None else frozenset(text.split())
