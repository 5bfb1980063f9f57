"""An authorization server over a real PostgreSQL, through a real socket, with a clock and randomness of the test."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from keyproxy.auth.api_key import KeyFormat
from keyproxy.authorize.connections import BOUNDS, Bounds
from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import Endpoint
from keyproxy.authorize.endpoints import parts_of
from keyproxy.authorize.listener import AuthorizeListener, Served
from keyproxy.authorize.metrics import OAuthCounts
from keyproxy.authorize.rate_limits import RateLimits
from keyproxy.config.oauth.oauth_settings import KnownClientRow, OAuthLogin, OAuthSettings
from keyproxy.config.schema import Log, Settings
from keyproxy.model import Moment
from keyproxy.store.directory.directory import Actor, Directory, Entity, KeyWish
from keyproxy.store.postgres.database import Database

#: The content of the secret file.
SECRET = b"a-secret-that-seals-tickets-0123456789"

SCOPES = ["jobs:read", "jobs:write"]

Json = dict[str, Any]


class FakeClock:
    """A clock that moves only when a test moves it. It starts at the real time, as the database has that."""

    def __init__(self) -> None:
        self.wall_seconds = time.time()
        self.mono_seconds = 1_000.0

    def now(self) -> Moment:
        """This instant."""
        return Moment(self.wall_seconds, self.mono_seconds)

    def advance(self, seconds: float) -> None:
        """Move on."""
        self.wall_seconds += seconds
        self.mono_seconds += seconds


@dataclass
class Reply:
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    cookies: Mapping[str, str]

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()

    @property
    def error(self) -> str:
        """The code of an OAuth error; empty for other responses."""
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        return str(self.json.get("error", "")) if is_json and self.status >= 400 else ""

    @property
    def location(self) -> URL:
        """Where a redirect leads. Its query is in `.query`."""
        return URL(self.headers["Location"])


@dataclass
class Authority:
    """A running authorization server, and the database behind it. `now`: its clock."""

    url: str
    session: aiohttp.ClientSession
    database: Database
    directory: Directory
    clock: FakeClock
    context: Context
    listener: AuthorizeListener
    log: list[Json] = field(default_factory=list)

    @property
    def resource(self) -> str:
        """The resource of live access tokens."""
        return self.context.settings.oauth.resource

    @property
    def counts(self) -> OAuthCounts:
        """What the server has counted."""
        return self.context.counts

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
        form: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
        content: object = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request; redirects are not followed, and cookies not kept. `form`: the body as a form; `content`: as
        JSON; `data`: the raw body."""
        sent: CIMultiDict[str] = CIMultiDict(headers or {})
        if form is not None:
            data = urlencode(form).encode()
            sent.setdefault("Content-Type", "application/x-www-form-urlencoded")
        elif content is not None:
            data = json.dumps(content).encode()
            sent.setdefault("Content-Type", "application/json")
        if query is not None:
            path += "?" + urlencode(query)
        url = URL(self.url + path, encoded=True)
        async with self.session.request(method, url, data=data, headers=sent, allow_redirects=False) as response:
            cookies = {name: morsel.value for name, morsel in response.cookies.items()}
            return Reply(response.status, response.headers.copy(), await response.read(), cookies)

    async def user(
        self, user: str = "u_42", tenant: str = "acme", *, scopes: Sequence[str] = SCOPES, **wish: Any
    ) -> Entity:
        """A user with its first key, whose secret is in `["key"]["secret"]`; creates the tenant if it is missing."""
        await self.directory.tenants.create(tenant, "")
        return await self.directory.users.create(user, tenant, KeyWish(scopes=scopes, **wish))


def pkce(verifier: str = "v" * 43) -> tuple[str, str]:
    """A verifier and its challenge."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return verifier, base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


@contextlib.asynccontextmanager
async def authorizing(
    database: Database,
    *,
    login: OAuthLogin | None = None,
    login_secret: str | None = None,
    known_clients: tuple[KnownClientRow, ...] = (),
    entropy: Callable[[int], bytes] = os.urandom,
    bounds: Bounds = BOUNDS,
    log: Log | None = None,
    endpoints: Sequence[Endpoint] = (),
    **oauth: Any,
) -> AsyncIterator[Authority]:
    """An authorization server on its own port, over this database. `endpoints`: further ones; `oauth`: keys of `[oauth]`.

    Its issuer is its own URL, and its resources are `/mcp` and `/test-mcp` there, unless `oauth` names others.
    """
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        defaults = {"issuer": url, "resource": f"{url}/mcp", "test_resource": f"{url}/test-mcp", "scopes": SCOPES}
        settings = Settings(
            oauth=OAuthSettings(**(defaults | oauth)),
            oauth_login=login or OAuthLogin(),
            oauth_known_clients=known_clients,
            log=log or Log(),
        )
        clock, key_format = FakeClock(), KeyFormat()
        context = Context(
            settings,
            database,
            key_format,
            (SECRET,),
            clock.now,
            entropy,
            RateLimits(clock.now),
            OAuthCounts(),
            login_secret=login_secret,
            store_now=lambda: datetime.fromtimestamp(clock.wall_seconds, UTC),
        )
        parts = parts_of(context)
        lines: list[Json] = []
        listener = AuthorizeListener(
            Served(context, parts._replace(endpoints=(*parts.endpoints, *endpoints))),
            log_line=lambda line, _status: lines.append(json.loads(line)),
            bounds=bounds,
        )
        await listener.start(sock)
        try:
            async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
                directory = Directory(database, key_format, Actor("cli:test", "host"))
                yield Authority(url, session, database, directory, clock, context, listener, lines)
        finally:
            await listener.close()
