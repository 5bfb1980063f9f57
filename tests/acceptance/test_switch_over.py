"""A switch-over behind an address that moves while the old server stays up, read-only, with its connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from keyproxy.store.postgres import migrations
from tests.acceptance.conftest import Configure, Site, until
from tests.acceptance.test_promotion import Server, servers  # noqa: F401 - the fixture
from tests.rawhttp import answer_with
from tests.store.harness import Relay

FRESH_SECONDS = 10.0

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture
async def address() -> AsyncIterator[Relay]:
    """An address that does not point to a server yet."""
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        relay = Relay(Path(directory), "postgresql:///postgres?host=/nowhere&port=1")
        await relay.mend()
        yield relay
        await relay.cut()


async def _replica_of(primary: Server, replica: Server) -> asyncpg.Connection:
    replica.copy(primary)
    replica.start()
    return await replica.connect()


async def _promoted(sql: asyncpg.Connection, replica: asyncpg.Connection, *, by: str) -> None:
    """Make the primary read-only and keep it running; promote the replica, which has all of its data."""
    await sql.execute(by)
    await sql.execute("SELECT pg_reload_conf()")
    end = await sql.fetchval("SELECT pg_current_wal_lsn()")
    await until(lambda: _has_replayed(replica, end), seconds=20)
    await replica.execute("SELECT pg_promote()")


async def _has_replayed(replica: asyncpg.Connection, end: int) -> bool:
    return bool(await replica.fetchval("SELECT pg_last_wal_replay_lsn() >= $1::pg_lsn", end))


async def _ready(site: Site) -> tuple[int, Any]:
    status, page = await site.ops("/readyz")
    return status, json.loads(page)


async def test_a_proxy_follows_the_database_while_the_old_server_stays_up_read_only(
    configure: Configure,
    servers: tuple[Server, Server],  # noqa: F811
    address: Relay,
) -> None:
    primary, second = servers
    sql = await primary.connect()
    await migrations.migrate(primary.dsn)
    address.lead_to(primary.dsn)
    site = configure(
        address.dsn,
        cache={"fresh_seconds": FRESH_SECONDS},
        store={"statement_timeout_seconds": 1.0},
        # After a promotion the ledger grants nothing for the duration of a lease: see docs/ledger.md.
        ledger={"lease_seconds": 3.0},
    )
    site.upstream.answering = answer_with(_ANSWER)
    revoked, limited, plain = [await site.key(user) for user in ("u_1", "u_2", "u_3")]
    await sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', '{\"requests_per_day\": 1000000}')")
    await sql.execute("UPDATE keyproxy.users SET plan_id = 'p' WHERE id = 'u_2'")
    replica = await _replica_of(primary, second)
    async with site.serving():
        for key in (revoked, limited, plain):
            assert (await site.call(key["secret"]))[0] == 200
        await until(lambda: _is_status(site, "ok"), seconds=10)

        await _promoted(sql, replica, by="ALTER SYSTEM SET default_transaction_read_only = on")
        # Until the address moves there is no primary, and /readyz reports the reason.
        await until(lambda: _reports_store(site, "read-only"), seconds=5)
        assert (await _ready(site))[1]["status"] == "degraded"
        # The reason names the server.
        assert await _reports_store(site, address.dsn.rpartition("host=")[2].partition("&")[0])

        address.lead_to(second.dsn)
        moved = time.monotonic()
        await until(lambda: _is_writable(replica), seconds=20)
        await replica.execute("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = $1", revoked["id"])
        took: dict[str, float] = {}
        await until(lambda: _answers(site, revoked["secret"], 401), seconds=FRESH_SECONDS)
        took["revocation seen"] = time.monotonic() - moved
        await until(lambda: _answers(site, limited["secret"], 200), seconds=FRESH_SECONDS)
        took["limited key served"] = time.monotonic() - moved
        try:
            await until(lambda: _is_status(site, "ok"), seconds=FRESH_SECONDS)
        except TimeoutError:
            pytest.fail(f"not ready: {await _ready(site)}")
        took["/readyz ok"] = time.monotonic() - moved
        for _ in range(20):
            assert (await site.call(limited["secret"]))[0] == 200
        print({what: round(seconds, 2) for what, seconds in took.items()})
        assert max(took.values()) <= FRESH_SECONDS
    # Every request that the upstream saw is on record, and nothing was written to the old server.
    counted = await replica.fetchval("SELECT sum(requests)::int8 FROM keyproxy.usage")
    assert counted == len(site.upstream.heads)
    assert await replica.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'keyproxy'") == 0
    assert await sql.fetchval("SELECT spent FROM keyproxy.windows") < await replica.fetchval(
        "SELECT spent FROM keyproxy.windows"
    )
    await sql.close()
    await replica.close()


async def test_a_proxy_that_starts_on_a_standby_does_not_use_it_and_finds_the_primary(
    configure: Configure,
    servers: tuple[Server, Server],  # noqa: F811
    address: Relay,
) -> None:
    primary, second = servers
    sql = await primary.connect()
    await migrations.migrate(primary.dsn)
    address.lead_to(primary.dsn)
    site = configure(address.dsn, cache={"fresh_seconds": FRESH_SECONDS})
    site.upstream.answering = answer_with(_ANSWER)
    key = await site.key()
    replica = await _replica_of(primary, second)
    address.lead_to(second.dsn)
    async with site.serving():
        assert (await site.call(key["secret"])) == (503, "store_unavailable")
        status, page = await _ready(site)
        assert (status, page["status"]) == (503, "failed")
        assert "standby" in page["checks"]["store"]["reason"]
        address.lead_to(primary.dsn)
        moved = time.monotonic()
        await until(lambda: _answers(site, key["secret"], 200), seconds=FRESH_SECONDS)
        await until(lambda: _is_status(site, "ok"), seconds=FRESH_SECONDS)
        print(f"served after {time.monotonic() - moved:.2f} s")
    with contextlib.suppress(asyncpg.PostgresError):
        await replica.close()
    await sql.close()


async def test_the_primary_is_found_among_several_hosts_also_after_it_changes(
    configure: Configure,
    servers: tuple[Server, Server],  # noqa: F811
) -> None:
    primary, second = servers
    sql = await primary.connect()
    await migrations.migrate(primary.dsn)
    replica = await _replica_of(primary, second)
    both = f"postgresql://keyproxy@/postgres?host={second.sockets},{primary.sockets}&port=5432"
    site = configure(both, cache={"fresh_seconds": FRESH_SECONDS})
    site.upstream.answering = answer_with(_ANSWER)
    key = await site.key()
    async with site.serving():
        assert (await site.call(key["secret"]))[0] == 200
        await until(lambda: _has_replayed_all(sql, replica), seconds=10)
        primary.crash()
        await replica.execute("SELECT pg_promote()")
        await until(lambda: _is_writable(replica), seconds=20)
        promoted = time.monotonic()
        await replica.execute("UPDATE keyproxy.api_keys SET revoked_at = now()")
        await until(lambda: _answers(site, key["secret"], 401), seconds=FRESH_SECONDS)
        print(f"revocation seen after {time.monotonic() - promoted:.2f} s")
    await replica.close()


async def _has_replayed_all(sql: asyncpg.Connection, replica: asyncpg.Connection) -> bool:
    return await _has_replayed(replica, await sql.fetchval("SELECT pg_current_wal_lsn()"))


async def _is_writable(sql: asyncpg.Connection) -> bool:
    await asyncio.sleep(0.02)
    return not await sql.fetchval("SELECT pg_is_in_recovery()")


async def _answers(site: Site, secret: str, status: int) -> bool:
    return (await site.call(secret))[0] == status


async def _reports_store(site: Site, words: str) -> bool:
    return words in (await _ready(site))[1]["checks"]["store"].get("reason", "")


async def _is_status(site: Site, wanted: str) -> bool:
    return bool((await _ready(site))[1]["status"] == wanted)
