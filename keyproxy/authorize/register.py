"""The registration endpoint, RFC 7591. Registration is a pure function, so that it never waits and stores nothing."""

from __future__ import annotations

from aiohttp import web

from keyproxy.authorize.endpoint import Endpoint
from keyproxy.authorize.form import body_of
from keyproxy.authorize.rate_limits import Rate
from keyproxy.oauth.client_policy import ClientPolicy
from keyproxy.oauth.registration import register


def register_endpoint(policy: ClientPolicy) -> Endpoint:
    """The endpoint under this policy."""

    async def handle(request: web.Request) -> web.Response:
        content = register(await body_of(request), policy)
        return web.Response(status=201, body=content, content_type="application/json")

    return Endpoint(
        "register",
        ("/oauth/register", "/register"),
        {"POST": handle},
        is_cross_origin=True,
        limit=Rate.REGISTER,
    )
