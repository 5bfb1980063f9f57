"""What store tests are played on: a clock that is set, a wire that is cut, a door that is watched, rows by raw SQL."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast
from urllib.parse import urlsplit

import asyncpg

from keyproxy.auth.api_key import SecretKey
from keyproxy.model import Identity, Missing, Moment
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.change_feed import ChangeFeed
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.postgres.database import Database, Listener, Row, StoreUnavailable
from tests import fakes
from tests.server import address_of, password_of

#: A raw connection: any SQL client.
Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

DEADLINE_SECONDS = 10.0
_ROUNDS_MAX = 4
_SOCKET_NAME = ".s.PGSQL.5432"


async def until(condition: Callable[[], bool], what: str, *, seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until something is so. Fails, saying what, after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.003)


async def until_row(sql: Sql, query: str, *arguments: object, seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until a query yields a row."""
    deadline = time.monotonic() + seconds
    while await sql.fetchrow(query, *arguments) is None:
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {query}")
        await asyncio.sleep(0.01)


async def until_blocked(sql: Sql, text: str) -> None:
    """Wait until a statement that contains `text` waits for a lock."""
    await until_row(
        sql,
        "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        " AND position($1 in query) > 0 AND pid <> pg_backend_pid()",
        text,
    )


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.wall_seconds = 1_800_000_000.0
        self.mono_seconds = 5_000.0

    def __call__(self) -> Moment:
        return Moment(self.wall_seconds, self.mono_seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass, on both clocks."""
        self.wall_seconds += seconds
        self.mono_seconds += seconds


class Hold:
    """Answers that are in hand and not yet handed on."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self._may_pass = asyncio.Event()

    async def passing(self) -> None:
        """Wait to be let go."""
        self.arrived.set()
        await self._may_pass.wait()

    def release(self) -> None:
        """Let go of all, and hold no more."""
        self._may_pass.set()


class Door(Database):
    """The real door, watched: what goes through is counted, and its answers can be held back."""

    def __init__(self, dsn: str, *, pool_size_max: int = 4, statement_timeout_seconds: float = 5.0) -> None:
        super().__init__(dsn, pool_size_max=pool_size_max, statement_timeout_seconds=statement_timeout_seconds)
        self.asked: collections.Counter[str] = collections.Counter()
        self.arguments: dict[str, list[Sequence[object]]] = collections.defaultdict(list)
        #: Called before a statement of this name is sent.
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}
        #: Called with the answer of a statement of this name.
        self.edit: dict[str, Callable[[Sequence[Row]], Sequence[Row]]] = {}
        self._holds: dict[str, Hold] = {}

    def hold(self, name: str) -> Hold:
        """Hold back the answers of a statement from now on."""
        hold = self._holds[name] = Hold()
        return hold

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        self.asked[name] += 1
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
        """How many queries for identities there were."""
        return self.asked["identities_by_digest"]


class Bell(Listener):
    """A listener that hears what the test says."""

    def __init__(self) -> None:
        super().__init__("", "")
        self.ring: Callable[[], None] = lambda: None
        self.is_open = asyncio.Event()

    async def open(self, heard: Callable[[], None], lost: Callable[[], None]) -> None:
        self.ring = heard
        self.is_open.set()


class Relay:
    """A wire to PostgreSQL that can be cut, mended and stopped up. Its `dsn` leads through it."""

    def __init__(self, directory: Path, dsn: str) -> None:
        self._directory = directory
        self._target = dsn
        self._server: asyncio.Server | None = None
        self._ends: set[_End] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self.is_frozen = False
        #: How many connections were accepted.
        self.accepted = 0

    @property
    def dsn(self) -> str:
        """How to connect through the wire."""
        password = password_of(self._target)
        who = f"keyproxy:{password}" if password else "keyproxy"
        return f"postgresql://{who}@/{urlsplit(self._target).path[1:]}?host={self._directory}&port=5432"

    def lead_to(self, dsn: str) -> None:
        """Connections made from now on lead to another server."""
        self._target = dsn

    async def mend(self) -> None:
        """Accept connections."""
        path = self._directory / _SOCKET_NAME
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _End(self), str(path))
        path.chmod(0o777)

    async def cut(self) -> None:
        """End all connections, and accept none."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        (self._directory / _SOCKET_NAME).unlink(missing_ok=True)
        await until(self._is_quiet, "the wire is quiet")

    def _is_quiet(self) -> bool:
        # Again and again: one that was being accepted as the server closed comes only now.
        self.cut_connections()
        return not self._ends and not self._connecting

    def cut_connections(self) -> None:
        """End all connections; new ones may be made."""
        for end in list(self._ends):
            end.cut()

    def freeze(self) -> None:
        """Let no byte through, as a network does that drops packets."""
        self.is_frozen = True
        for end in self._ends:
            end.pause()

    def thaw(self) -> None:
        """Let bytes through again."""
        self.is_frozen = False
        for end in self._ends:
            end.resume()

    def joined(self, near: _End) -> None:
        """A client has come: connect it to the server."""
        self.accepted += 1
        task = asyncio.get_running_loop().create_task(self._connect(near))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def opened(self, end: _End) -> None:
        """One side of a connection is there."""
        self._ends.add(end)

    def left(self, end: _End) -> None:
        """One side of a connection is gone."""
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
    """One side of a relayed connection. The side to the server knows its peer when it is made."""

    def __init__(self, relay: Relay, peer: _End | None = None) -> None:
        self._relay = relay
        self._peer = peer
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
        """The other side is there."""
        self._peer = peer
        if self._is_cut:
            peer.cut()
        for data in self._early:
            peer.send(data)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        if self._peer is None:
            self._early.append(data)
        else:
            self._peer.send(data)

    def send(self, data: bytes) -> None:
        """Pass bytes on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def connection_lost(self, _error: Exception | None) -> None:
        self._is_cut = True
        self._relay.left(self)
        if self._peer is not None:
            self._peer.close()

    def close(self) -> None:
        """End this side after what was written."""
        if self._transport is not None:
            self._transport.close()

    def cut(self) -> None:
        """End this side now."""
        self._is_cut = True
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Read no more."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


@dataclass
class Rig:
    """A cache and a feed over a real database, reached over a wire that can be cut; `sql` goes past all of it."""

    dsn: str
    sql: Sql
    relay: Relay
    door: Door
    clock: Clock
    state: FeedState
    last_used: LastUsed
    cache: IdentityCache
    feed: ChangeFeed

    def hot(self, secret: SecretKey, *, is_first_lookup: bool = True) -> Identity | Reason | None:
        """What memory says at once: an identity, why not, or None if the store has to be asked."""
        try:
            return self.cache.known(secret.digest(), self.clock(), is_first_lookup=is_first_lookup)
        except Refusal as refusal:
            return refusal.reason
        except Missing:
            return None

    def is_served(self, secret: SecretKey) -> bool:
        """Whether memory serves this key at once. Is not counted as a request."""
        return isinstance(self.hot(secret, is_first_lookup=False), Identity)

    async def resolve(self, secret: SecretKey) -> Identity | Reason:
        """What a request with this key is told, after waiting for what has to be fetched. As the gateway does it."""
        found = self.hot(secret)
        for _ in range(_ROUNDS_MAX):
            if found is not None:
                return found
            failure = await self.fetch_missing(secret)
            found = self.hot(secret, is_first_lookup=False)
            if found is None and failure is not None:
                return failure
        return Reason.INTERNAL_ERROR if found is None else found

    async def fetch_missing(self, secret: SecretKey) -> Reason | None:
        """Have the store asked for a key that memory misses; why not, if it could not be."""
        try:
            self.cache.known(secret.digest(), self.clock(), is_first_lookup=False)
        except Missing as missing:
            try:
                await missing.fetch_missing()
            except Refusal as refusal:
                return refusal.reason
            return None
        except Refusal as refusal:
            return refusal.reason
        return None

    async def goes_down(self) -> None:
        """The store cannot be reached, and the feed has found that out."""
        await self.relay.cut()
        try:
            await self.feed.look()
        except StoreUnavailable:
            assert self.door.is_down
            return
        raise AssertionError("the store answered over a cut wire")

    async def comes_back(self) -> None:
        """The store can be reached, and the feed has found that out."""
        await self.relay.mend()
        await self.feed.look()
        assert self.door.is_up

    async def is_quiet(self) -> None:
        """Nothing is being asked for."""
        await until(lambda: self.cache.sizes()["asked"] == 0, "no look-up is under way")


async def add_tenant(sql: Sql, tenant: str = "acme") -> None:
    """A tenant."""
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ($1)", tenant)


async def add_user(sql: Sql, user: str = "u_42", tenant: str = "acme") -> None:
    """A user, and its tenant if need be."""
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ($1) ON CONFLICT DO NOTHING", tenant)
    await sql.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES ($1, $2)", user, tenant)


async def add_keys(sql: Sql, numbers: Iterable[int], user: str = "u_42") -> list[SecretKey]:
    """Live keys `key_<number>` of a user, in one statement."""
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
    """One live key `key_<number>` of a user."""
    (secret,) = await add_keys(sql, [number], user)
    return secret


async def change_rows(sql: Sql) -> int:
    """How many rows the change feed has."""
    count: int = await sql.fetchval("SELECT count(*) FROM keyproxy.changes")
    return count


async def audit_rows(sql: Sql) -> int:
    """How many rows the audit log has."""
    count: int = await sql.fetchval("SELECT count(*) FROM keyproxy.audit_log")
    return count
