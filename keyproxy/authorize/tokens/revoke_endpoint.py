"""The revocation endpoint, RFC 7009: a refresh token ends its session, an access token only itself."""

from __future__ import annotations

from aiohttp import web

from keyproxy.authorize.clients.authentication import ClientAuthentication
from keyproxy.authorize.endpoint import USER, Endpoint
from keyproxy.authorize.form import form_of
from keyproxy.authorize.rate_limits import Rate
from keyproxy.authorize.responses import json_response
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.store.oauth.tokens import TokenStore


class RevokeEndpoint:
    """Revokes tokens of the client. An unknown token, or another client's, has the same response and no effect."""

    def __init__(self, tokens: TokenStore, authentication: ClientAuthentication) -> None:
        self._tokens = tokens
        self._authentication = authentication

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint as a value."""
        return Endpoint(
            "revoke",
            ("/oauth/revoke",),
            {"POST": self.handle},
            is_cross_origin=True,
            is_on_mtls=True,
            failures=Rate.FAILED_TOKEN_REQUESTS,
        )

    async def handle(self, request: web.Request) -> web.Response:
        """Handle a request. Raises OAuthError and StoreUnavailable."""
        form = await form_of(request)
        client = await self._authentication.authenticate(form, request)
        token = form.get("token")
        if token is None:
            raise OAuthError("invalid_request", "'token' is missing.")
        # The format shows what it is, so `token_type_hint` is not needed.
        user = await self._tokens.revoke(client, token.encode("utf-8", "surrogateescape"))
        if user is not None:
            request[USER] = user
        return json_response(200, {})
