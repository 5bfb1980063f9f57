"""The wire between real sockets: a proxy over fake identities, in front of an upstream made of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest

from keyproxy.ai.categories import Category
from keyproxy.ai.models import Model
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.config.schema import LedgerSettings, Listen, RouteRow, Settings
from keyproxy.config.schema import Upstream as UpstreamSettings
from keyproxy.config.token_settings import Tokens
from keyproxy.config.tools.tool_settings import McpSettings, ToolRow
from keyproxy.gateway import Gateway
from keyproxy.http.routes import RouteTable
from keyproxy.platform import clock, sockets
from keyproxy.process.patterns.re2_matcher import compile_patterns
from keyproxy.process.terms import build_gateway, build_terms, build_upstreams
from keyproxy.store.ledger.charge_dedup import Claims
from keyproxy.wire.client.request_ids import RequestIds
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.server import ProxyServer
from keyproxy.wire.upstream.pool import UpstreamPool
from tests import fakes
from tests.rawhttp import Client, Upstream, connect
from tests.reference_claims import ReferenceClaims

KEY = fakes.key(1).reveal()
AUTHORIZATION = b"Authorization: Api-Key " + KEY + b"\r\n"


@dataclasses.dataclass
class Wire:
    """A running proxy, and all that is around it."""

    address: tuple[str, int] | str
    upstream: Upstream
    identities: fakes.FakeIdentities
    recorder: fakes.FakeRecorder
    server: ProxyServer
    pool: UpstreamPool
    gateway: Gateway
    ledger: fakes.FakeLedger
    charges: ReferenceClaims
    claims: Claims
    owned_ids: fakes.FakeOwnedIds
    templates: fakes.FakePromptTemplates
    mint: fakes.FakeMint
    approvals: fakes.FakeApprovals
    upstream_credentials: fakes.FakeUpstreamCredentials

    def client(self) -> contextlib.AbstractAsyncContextManager[Client]:
        """A connection to the proxy."""
        return connect(self.address)


Start = Callable[..., Awaitable[Wire]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start a proxy: `await start(listen={...}, upstream={...}, rows=[...])`; `routes`: instead of `rows`."""
    async with contextlib.AsyncExitStack() as stack:

        async def starting(
            *,
            listen: dict[str, Any] | None = None,
            upstream: dict[str, Any] | None = None,
            tokens: dict[str, Any] | None = None,
            rows: Sequence[RouteRow] = (),
            models: Sequence[Model] = (),
            categories: Sequence[Category] = (),
            tools: Sequence[ToolRow] = (),
            mcp: McpSettings | None = None,
            oauth: OAuthSettings | None = None,
            serving: Upstream | None = None,
            routes: RouteTable | None = None,
            sweep_seconds: float = 0.1,
            tls: ssl.SSLContext | None = None,
            upstream_tls: ssl.SSLContext | None = None,
        ) -> Wire:
            loop = asyncio.get_running_loop()
            far = await stack.enter_async_context((serving or Upstream()).serving())
            ledger = fakes.FakeLedger()
            identities, recorder = fakes.FakeIdentities(), fakes.FakeRecorder()
            identities.add(fakes.key(1), fakes.identity())
            charges = ReferenceClaims()
            claims = Claims(charges, ledger, LedgerSettings(settle_seconds=0.05), clock.now)
            claims.start()
            stack.push_async_callback(claims.close)
            settings = Settings(
                listen=Listen(**({"address": "127.0.0.1:0"} | (listen or {}))),
                upstream=UpstreamSettings(**({"url": f"http://127.0.0.1:{far.port}"} | (upstream or {}))),
                tokens=Tokens(**(tokens or {})),
                routes=tuple(rows),
                models=tuple(models),
                categories=tuple(categories),
                tools=tuple(tools),
                mcp=mcp or McpSettings(),
                oauth=oauth or OAuthSettings(),
            )
            table = settings.route_table() if rows else routes or RouteTable([])
            owned_ids, templates = fakes.FakeOwnedIds(), fakes.FakePromptTemplates()
            mint, approvals = fakes.FakeMint(settings.access.mint_rules()), fakes.FakeApprovals()
            upstream_credentials = fakes.FakeUpstreamCredentials()
            gateway = build_gateway(
                settings, table, identities=identities, owned_ids=owned_ids, templates=templates,
                ledger=ledger, claims=claims, approvals=approvals, mint=mint, patterns=compile_patterns(categories),
                upstream_credentials=upstream_credentials,
            )  # fmt: skip
            deadlines = Deadlines(loop, clock.monotonic, period_seconds=sweep_seconds)
            deadlines.start()
            stack.callback(deadlines.stop)
            upstreams = build_upstreams(settings, deadlines, loop, upstream_tls)
            pool = upstreams.distinct()["live"]
            stack.push_async_callback(pool.close)
            server = ProxyServer(
                build_terms(settings, table, gateway, upstreams, tls=tls),
                recorder=recorder,
                deadlines=deadlines,
                clock=clock.monotonic,
                loop=loop,
                request_ids=RequestIds(b"test"),
            )
            sock = sockets.bind(server.listen.address)
            stack.callback(sock.close)
            stack.push_async_callback(server.drain, 0.2)
            server.start(sock)
            address = sock.getsockname()
            return Wire(
                address, far, identities, recorder, server, pool, gateway, ledger, charges, claims, owned_ids, templates,
                mint, approvals, upstream_credentials,
            )  # fmt: skip

        yield starting


@pytest.fixture
async def wire(start: Start) -> Wire:
    """A proxy with the usual settings."""
    return await start()


def request(
    method: str = "POST", target: str = "/v1/ai/jobs", *lines: str, body: bytes = b"", key: bytes | None = KEY
) -> bytes:
    """A request with a key and a Content-Length if there is a body."""
    head = [f"{method} {target} HTTP/1.1", "Host: proxy.test"]
    if key is not None:
        head.append(f"Authorization: Api-Key {key.decode()}")
    head += lines
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body
