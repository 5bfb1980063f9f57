"""Test equipment: a clock set by the test, a relay that can be cut, an instrumented database, rows by raw SQL."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast
from urllib.parse import urlsplit

import asyncpg

from keyproxy.auth.api_key import SecretKey
from keyproxy.limits.ledger_protocol import Window
from keyproxy.model import Identity, Missing, Moment
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.change_feed import ChangeFeed
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.identities.owned_ids import OwnedIdCache
from keyproxy.store.postgres import migrations, queries
from keyproxy.store.postgres.database import Database, NotificationListener, Row, StoreUnavailable
from keyproxy.store.prompt_templates import TemplateCache
from keyproxy.store.signing_keys import SigningKeyCache
from tests import fakes
from tests.server import address_of, password_of
from tests.waiting import until

#: A raw connection, in the place of any SQL client.
Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

DEADLINE_SECONDS = 10.0
_ROUNDS_MAX = 4
_SOCKET_NAME = ".s.PGSQL.5432"


async def until_row(sql: Sql, query: str, *arguments: object, seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until a query yields a row."""

    async def has_row() -> bool:
        return await sql.fetchrow(query, *arguments) is not None

    await until(has_row, query, seconds=seconds)


async def until_blocked(sql: Sql, text: str) -> None:
    """Wait until a statement that contains `text` waits for a lock."""
    query = (
        "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        " AND position($1 in query) > 0 AND pid <> pg_backend_pid()"
    )

    async def is_blocked() -> bool:
        # A transaction reads the activity of other sessions once, and keeps what it has read.
        await sql.execute("SELECT pg_stat_clear_snapshot()")
        return await sql.fetchrow(query, text) is not None

    await until(is_blocked, f"a statement with {text} waits for a lock", seconds=DEADLINE_SECONDS)


async def migrated_up_to(dsn: str, number: int) -> None:
    """Apply the migrations up to this one to an empty database."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(migrations._BOOK)
    for one in migrations.available()[:number]:
        await connection.execute(one.statements)
        await connection.execute(
            "INSERT INTO keyproxy.migrations (number, name, checksum) VALUES ($1, $2, $3)",
            one.number, one.name, one.checksum,
        )  # fmt: skip
    await connection.close()


async def credit(sql: Sql, window: Window, amount: int) -> None:
    """Add an amount to the limit of a current window, as the admin side does."""
    await sql.execute(
        "SELECT keyproxy.credit_window($1, $2, $3, $4, $5, 1000000, $6, 'test')",
        *window.pool, window.measure, window.selector, amount,
    )  # fmt: skip


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.wall_seconds = 1_800_000_000.0
        self.mono_seconds = 5_000.0

    def __call__(self) -> Moment:
        return Moment(self.wall_seconds, self.mono_seconds)

    def advance(self, seconds: float) -> None:
        """Advance both clocks."""
        self.wall_seconds += seconds
        self.mono_seconds += seconds


class PlainDatabase:
    """One connection in place of the database."""

    def __init__(self, sql: Sql) -> None:
        self._sql, self._statements = sql, queries.load()

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        """See Database."""
        rows: Sequence[Row] = await self._sql.fetch(self._statements[name], *arguments)
        return rows


class Hold:
    """Results that have arrived and are held back."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self._may_pass = asyncio.Event()

    async def passing(self) -> None:
        """Wait for the release."""
        self.arrived.set()
        await self._may_pass.wait()

    def release(self) -> None:
        """Release all results, and hold back no more."""
        self._may_pass.set()


class StatementRunner(Database):
    """The real database, instrumented: statements are counted, and their results can be held back."""

    def __init__(self, dsn: str, *, pool_size_max: int = 4, statement_timeout_seconds: float = 5.0) -> None:
        super().__init__(dsn, pool_size_max=pool_size_max, statement_timeout_seconds=statement_timeout_seconds)
        self.queries: collections.Counter[str] = collections.Counter()
        self.arguments: dict[str, list[Sequence[object]]] = collections.defaultdict(list)
        #: Called before a statement of this name is sent.
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}
        #: Called with the result of a statement of this name.
        self.edit: dict[str, Callable[[Sequence[Row]], Sequence[Row]]] = {}
        self._holds: dict[str, Hold] = {}

    def hold(self, name: str) -> Hold:
        """Hold back the results of a statement from now on."""
        hold = self._holds[name] = Hold()
        return hold

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        self.queries[name] += 1
        self.arguments[name].append(arguments)
        hold = self._holds.get(name)
        if name in self.before:
            await self.before[name]()
        rows = await super().fetch(name, *arguments)
        if name in self.edit:
            rows = self.edit[name](rows)
        if hold is not None:
            await hold.passing()
        return rows

    @property
    def look_ups(self) -> int:
        """How many queries for identities of keys have been sent."""
        return self.queries["identities_by_digest"]

    @property
    def acting_look_ups(self) -> int:
        """How many queries for keys that act have been sent."""
        return self.queries["acting_identities"]


class Bell(NotificationListener):
    """A listener that receives notifications from the test."""

    def __init__(self) -> None:
        super().__init__("", "")
        self.ring: Callable[[], None] = lambda: None
        self.is_open = asyncio.Event()

    async def open(self, notified: Callable[[], None], lost: Callable[[], None]) -> None:
        self.ring = notified
        self.is_open.set()


class Relay:
    """A relay to PostgreSQL that can be cut, restored and stalled. Its `dsn` leads through it."""

    def __init__(self, directory: Path, dsn: str) -> None:
        self._directory = directory
        self._target = dsn
        self._server: asyncio.Server | None = None
        self._ends: set[_End] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self.is_frozen = False
        #: Whether replies are lost: a connection is cut when the server replies to a statement.
        self.loses_replies = False
        #: Whether replies are held back for ever.
        self.holds_replies = False
        #: How many connections it has accepted.
        self.accepted = 0

    @property
    def dsn(self) -> str:
        """The DSN of the database through the relay."""
        password = password_of(self._target)
        who = f"keyproxy:{password}" if password else "keyproxy"
        return f"postgresql://{who}@/{urlsplit(self._target).path[1:]}?host={self._directory}&port=5432"

    def lead_to(self, dsn: str) -> None:
        """Route new connections to another server."""
        self._target = dsn

    async def mend(self) -> None:
        """Accept connections."""
        path = self._directory / _SOCKET_NAME
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _End(self), str(path))
        path.chmod(0o777)

    async def cut(self) -> None:
        """Close all connections, and accept none."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        (self._directory / _SOCKET_NAME).unlink(missing_ok=True)
        await until(self._is_quiet, "the relay is idle")

    def _is_quiet(self) -> bool:
        # Repeatedly: a connection that was being accepted when the server closed appears only now.
        self.cut_connections()
        return not self._ends and not self._connecting

    def cut_connections(self) -> None:
        """Close all connections; new ones are accepted."""
        for end in list(self._ends):
            end.cut()

    def freeze(self) -> None:
        """Forward no bytes, like a network that drops packets."""
        self.is_frozen = True
        for end in self._ends:
            end.pause()

    def thaw(self) -> None:
        """Forward bytes again."""
        self.is_frozen = False
        for end in self._ends:
            end.resume()

    def joined(self, near: _End) -> None:
        """A client has connected: connect to the server."""
        self.accepted += 1
        task = asyncio.get_running_loop().create_task(self._connect(near))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def opened(self, end: _End) -> None:
        """One side of a connection is open."""
        self._ends.add(end)

    def left(self, end: _End) -> None:
        """One side of a connection is closed."""
        self._ends.discard(end)

    async def _connect(self, near: _End) -> None:
        address, loop = address_of(self._target), asyncio.get_running_loop()
        try:
            if isinstance(address, str):
                await loop.create_unix_connection(lambda: _End(self, near), address)
            else:
                await loop.create_connection(lambda: _End(self, near), *address)
        except OSError:
            near.cut()


class _End(asyncio.Protocol):
    """One side of a relayed connection. The side to the server gets its peer at creation."""

    def __init__(self, relay: Relay, peer: _End | None = None) -> None:
        self._relay = relay
        self._peer = peer
        self._is_of_server = peer is not None
        self._early: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._is_cut = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._relay.opened(self)
        if self._relay.is_frozen:
            self.pause()
        if self._peer is None:
            self._relay.joined(self)
        else:
            self._peer.meet(self)

    def meet(self, peer: _End) -> None:
        """The other side is open."""
        self._peer = peer
        if self._is_cut:
            peer.cut()
        for data in self._early:
            peer.send(data)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        if self._is_of_server and self._relay.holds_replies:
            return
        if self._is_of_server and self._relay.loses_replies:
            self.cut()
        elif self._peer is None:
            self._early.append(data)
        else:
            self._peer.send(data)

    def send(self, data: bytes) -> None:
        """Forward bytes."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def connection_lost(self, _error: Exception | None) -> None:
        self._is_cut = True
        self._relay.left(self)
        if self._peer is not None:
            self._peer.close()

    def close(self) -> None:
        """Close this side after flushing."""
        if self._transport is not None:
            self._transport.close()

    def cut(self) -> None:
        """Abort this side."""
        self._is_cut = True
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Pause reading."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Resume reading."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


@dataclass
class Rig:
    """A cache and a feed over a real database behind a relay that can be cut; `sql` bypasses all of it."""

    dsn: str
    sql: Sql
    relay: Relay
    door: StatementRunner
    clock: Clock
    state: FeedState
    last_used: LastUsed
    cache: IdentityCache
    owned: OwnedIdCache
    templates: TemplateCache
    signing_keys: SigningKeyCache
    feed: ChangeFeed
    now: Callable[[], Moment]

    def hot(
        self, secret: SecretKey, acting_for: str | None = None, *, is_first_lookup: bool = True
    ) -> Identity | Reason | None:
        """The immediate result of the cache: an identity, a refusal, or None if a lookup is needed.

        `acting_for`: the user that the key acts for.
        """
        try:
            return self.look(secret, acting_for, is_first_lookup=is_first_lookup)
        except Refusal as refusal:
            return refusal.reason
        except Missing:
            return None

    def look(self, secret: SecretKey, acting_for: str | None, *, is_first_lookup: bool) -> Identity:
        """Like `hot`. Raises Missing and Refusal."""
        if acting_for is None:
            return self.cache.known(secret.digest(), self.now(), is_first_lookup=is_first_lookup)
        return self.cache.acting(secret.digest(), acting_for, self.now(), is_first_lookup=is_first_lookup)

    def is_served(self, secret: SecretKey) -> bool:
        """Whether the cache serves this key. Is not counted as a request."""
        return isinstance(self.hot(secret, is_first_lookup=False), Identity)

    async def resolve(self, secret: SecretKey, acting_for: str | None = None) -> Identity | Reason:
        """The result of a request with this key, with the fetches that the gateway would do."""
        found = self.hot(secret, acting_for)
        for _ in range(_ROUNDS_MAX):
            if found is not None:
                return found
            failure = await self.fetch_missing(secret, acting_for)
            found = self.hot(secret, acting_for, is_first_lookup=False)
            if found is None and failure is not None:
                return failure
        return Reason.INTERNAL_ERROR if found is None else found

    async def fetch_missing(self, secret: SecretKey, acting_for: str | None = None) -> Reason | None:
        """Look up what is not cached; return the refusal if this fails."""
        try:
            self.look(secret, acting_for, is_first_lookup=False)
        except Missing as missing:
            try:
                await self.cache.fetching(secret, missing).fetch_missing()
            except Refusal as refusal:
                return refusal.reason
            return None
        except Refusal as refusal:
            return refusal.reason
        return None

    async def goes_down(self) -> None:
        """Cut the relay and wait until the feed has noticed the outage."""
        await self.relay.cut()
        try:
            await self.feed.poll()
        except StoreUnavailable:
            assert self.door.is_down
            return
        raise AssertionError("the store responded through a cut relay")

    async def comes_back(self) -> None:
        """Restore the relay and wait until the feed has noticed the recovery."""
        await self.relay.mend()
        await self.feed.poll()
        assert self.door.is_up

    async def is_quiet(self) -> None:
        """Wait until no lookup is under way."""
        await until(lambda: self.cache.sizes()["looking_up"] == 0, "no look-up is under way")


async def add_tenant(sql: Sql, tenant: str = "acme") -> None:
    """Insert a tenant."""
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ($1)", tenant)


async def add_user(sql: Sql, user: str = "u_42", tenant: str = "acme") -> None:
    """Insert a user, and its tenant if it is missing."""
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ($1) ON CONFLICT DO NOTHING", tenant)
    await sql.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES ($1, $2)", user, tenant)


async def add_owned(sql: Sql, object_id: str, tenant: str = "acme", *, kind: str = "collection") -> None:
    """Let a tenant own an id; insert the tenant if it is missing."""
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ($1) ON CONFLICT DO NOTHING", tenant)
    await sql.execute("INSERT INTO keyproxy.owned (kind, id, tenant_id) VALUES ($1, $2, $3)", kind, object_id, tenant)


async def add_template(sql: Sql, digest: bytes, category: str = "code", tenant: str | None = None) -> None:
    """Register a template, or give it another category."""
    await sql.execute(
        "INSERT INTO keyproxy.prompt_templates (digest, category, tenant_id) VALUES ($1, $2, $3)"
        " ON CONFLICT (digest) DO UPDATE SET category = excluded.category, tenant_id = excluded.tenant_id",
        digest,
        category,
        tenant,
    )


async def add_keys(sql: Sql, numbers: Iterable[int], user: str = "u_42") -> list[SecretKey]:
    """Insert live keys `key_<number>` of a user, in one statement."""
    numbered = [(number, fakes.key(number)) for number in numbers]
    await sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest, scopes)"
        " SELECT 'key_' || n, $3, digest, '{jobs:write}' FROM unnest($1::int[], $2::bytea[]) AS new (n, digest)",
        [number for number, _ in numbered],
        [secret.digest() for _, secret in numbered],
        user,
    )
    return [secret for _, secret in numbered]


async def add_key(sql: Sql, number: int = 1, user: str = "u_42") -> SecretKey:
    """Insert one live key `key_<number>` of a user."""
    (secret,) = await add_keys(sql, [number], user)
    return secret


async def change_rows(sql: Sql) -> int:
    """The number of rows of the change feed."""
    count: int = await sql.fetchval("SELECT count(*) FROM keyproxy.changes")
    return count


async def audit_rows(sql: Sql) -> int:
    """The number of rows of the audit log."""
    count: int = await sql.fetchval("SELECT count(*) FROM keyproxy.audit_log")
    return count
