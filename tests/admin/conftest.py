"""An admin API over a real PostgreSQL, through a real socket."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest

from keyproxy.admin.authentication import Access
from keyproxy.admin.connections import BOUNDS, Bounds
from keyproxy.admin.endpoints import ApiConfig
from keyproxy.admin.listener import AdminListener, traffic
from keyproxy.admin.metrics_page import MetricsPage
from keyproxy.admin.service import Service
from keyproxy.admin.webhooks import Webhooks
from keyproxy.auth.api_key import KeyFormat
from keyproxy.auth.throttle import Throttle
from keyproxy.config.schema import RouteRow, Settings
from keyproxy.oauth.client import row_id
from keyproxy.platform import clock
from keyproxy.process.providers.operator_secrets import OperatorSecrets
from keyproxy.signing.token_check import ACCEPTS_NONE
from keyproxy.store.directory.admin_tokens import AdminTokens
from keyproxy.store.directory.agents.operator_mint import OperatorKey, SigningMint
from keyproxy.store.directory.directory import Actor, Directory, Entity, KeyWish
from keyproxy.store.postgres.database import Database
from keyproxy.store.signing_keys import SigningKeyCache
from tests.webhook_receiver import Receiver, receiving

FILE_TOKEN = "the-token-of-the-file-0123456789abcdef"

Json = dict[str, Any]


@dataclass
class Reply:
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of a refusal; empty for other responses."""
        is_problem = self.headers.get("Content-Type", "").startswith("application/problem+json")
        return str(self.json["code"]) if is_problem else ""


@dataclass
class Api:
    """A running admin API, and the directory behind it."""

    url: str
    session: aiohttp.ClientSession
    database: Database
    directory: Directory
    tokens: AdminTokens
    now: list[float]
    listener: AdminListener
    log: list[Json] = field(default_factory=list)

    async def token(self, *scopes: str, tenant: str | None = None, **wanted: Any) -> str:
        """The secret of a new token."""
        made = await self.tokens.create("a test's", scopes, tenant_id=tenant, expires_in=wanted.get("expires_in"))
        return str(made["secret"])

    async def call(
        self,
        method: str,
        path: str,
        content: object = None,
        *,
        token: str | None = FILE_TOKEN,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> Reply:
        """Send one request. `content`: the body, sent as JSON; `data`: the raw body."""
        sent = {} if token is None else {"Authorization": f"Bearer {token}"}
        if content is not None:
            data = json.dumps(content).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        body = None if data is None else io.BytesIO(data)
        async with self.session.request(
            method, self.url + path, data=body, headers=sent | dict(headers or {}), allow_redirects=False
        ) as response:
            return Reply(response.status, response.headers.copy(), await response.read())

    async def done(self, method: str, path: str, content: object = None, **more: Any) -> Any:
        """Send a request that must succeed; returns its JSON."""
        reply = await self.call(method, path, content, **more)
        assert reply.status < 300, reply.body
        return reply.json

    async def user(self, user: str = "u_1", tenant: str = "acme", *, scopes: Sequence[str] = ()) -> Entity:
        """A user with its first key; creates the tenant if it is missing."""
        await self.directory.tenants.create(tenant, "")
        return await self.directory.users.create(user, tenant, KeyWish(scopes=scopes))

    async def audit(self, **wanted: str) -> list[Json]:
        """The audit log, newest first."""
        query = "&".join(f"{name}={value}" for name, value in wanted.items())
        rows: list[Json] = (await self.done("GET", f"/v1/audit?{query}"))["items"]
        return rows


async def add_oauth_session(api: Api, user: str) -> tuple[str, str]:
    """A client named `worker` with a grant of this user and a session: the ids of these two."""
    client, grant, session = row_id("worker"), "gra_" + "1" * 22, "ses_" + "1" * 22
    fetch = api.database.fetch
    await fetch("add_client", client, "worker", "registered", "worker", [], "client_secret", bytes(32), None, None)
    await fetch("add_service_grant", grant, user, client, "https://mcp.example.com/mcp", ["a"], False)
    await fetch("open_service_session", grant, session, "worker", ["a"], datetime.now(UTC), 86_400)
    return grant, session


@pytest.fixture
def dsn(shared_dsn: str) -> str:
    """A migrated, empty database."""
    return shared_dsn


@contextlib.asynccontextmanager
async def serving(
    database: Database, *, routes: tuple[RouteRow, ...] = (), bounds: Bounds = BOUNDS,
    webhooks: Webhooks | None = None, settings: Settings | None = None,
) -> AsyncIterator[Api]:  # fmt: skip
    """An admin API on its own port, over this database. `settings`: instead of `routes`."""
    key_format, now = KeyFormat(), [clock.monotonic()]
    actor = Actor("cli:test", "host")
    tokens = AdminTokens(database, key_format, actor)
    access = Access(tokens, key_format, Throttle(), file_digest=hashlib.sha256(FILE_TOKEN.encode()).digest())
    settings = settings or Settings(routes=routes)
    operator_key = OperatorKey(SigningKeyCache(database, ACCEPTS_NONE, clock.now), clock.now)
    mint = SigningMint(settings.access, operator_key, clock.now)
    secrets = OperatorSecrets(settings)
    service = Service(database, key_format, access, ApiConfig(90, settings), mint, secrets, lambda: now[0])
    log: list[Json] = []
    webhooks = webhooks or Webhooks(database, lambda: settings)
    counted = traffic()
    listener = AdminListener(
        service, traffic=counted,
        metrics=MetricsPage(
            webhooks, now_mono=lambda: now[0], traffic=counted, minted=lambda: operator_key.minted,
        ).page,
        signing_keys=SigningKeyCache(database, ACCEPTS_NONE, clock.now),
        log_line=lambda line, _status: log.append(json.loads(line)), bounds=bounds,
    )  # fmt: skip
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        await listener.start(sock)
        try:
            async with aiohttp.ClientSession() as session:
                url = f"http://127.0.0.1:{sock.getsockname()[1]}"
                directory = Directory(database, key_format, actor, mint=mint, secrets=secrets, settings=settings)
                await operator_key.prepare()
                yield Api(url, session, database, directory, tokens, now, listener, log)
        finally:
            await listener.close()


@pytest.fixture
async def api(database: Database) -> AsyncIterator[Api]:
    """An admin API over this test's database."""
    async with serving(database) as api:
        yield api


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver of webhooks on its own port."""
    async with receiving() as receiver:
        yield receiver
