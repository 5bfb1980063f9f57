"""Suspension and signals through real proxies, the command line and the database."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from tests.acceptance.conftest import Configure, Site, until
from tests.store.harness import Sql
from tests.wire.test_long import REVOKED_SECONDS, stream

#: P4: a change by any SQL client.
CHANGE_SECONDS = 1.5


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[Sql]:
    """A connection of any SQL client."""
    connection: Sql = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


async def until_called(site: Site, secret: str, outcome: tuple[int, str], seconds: float = 5.0) -> float:
    """Call until this is the outcome; returns how long that took."""
    began = time.monotonic()

    async def is_outcome() -> bool:
        return await site.call(secret) == outcome

    await until(is_outcome, f"{outcome}", seconds=seconds)
    return time.monotonic() - began


async def from_address(site: Site, secret: str, address: str) -> int:
    """The status of one request from a client behind a trusted proxy."""
    async with site.client() as client:
        await client.send(
            f"POST /v1/ai/jobs HTTP/1.1\r\nHost: p\r\nX-Api-Key: {secret}\r\nX-Forwarded-For: {address}\r\n"
            "Content-Length: 2\r\n\r\n{}".encode()
        )
        return (await client.answer()).status


async def test_open_stream_of_a_suspended_key_ends_within_two_seconds(configure: Configure, dsn: str, sql: Sql) -> None:
    site = configure(dsn)
    key = await site.key()
    site.upstream.answering = stream
    async with site.serving(), site.client() as client:
        await client.send(f"GET /v1/stream HTTP/1.1\r\nHost: p\r\nX-Api-Key: {key['secret']}\r\n\r\n".encode())
        async with asyncio.timeout(5):
            await client.reader.readuntil(b"data: 1")
        await sql.execute("UPDATE keyproxy.api_keys SET suspended_at = now()")
        suspended = time.monotonic()
        await client.ends(seconds=REVOKED_SECONDS)
        assert time.monotonic() - suspended < REVOKED_SECONDS
        assert await site.call(key["secret"]) == (401, "api_key_suspended")


async def test_command_line_suspends_and_resumes_a_key(site: Site) -> None:
    key = await site.key()
    shown = await site.run_json("key", "suspend", key["id"], "--reason", "leaked?")
    assert (shown["state"], shown["suspend_reason"]) == ("suspended", "leaked?")
    assert [found["id"] for found in await site.run_json("key", "list", "--state", "suspended")] == [key["id"]]
    resumed = await site.run_json("key", "resume", key["id"])
    assert (resumed["state"], resumed["suspended_at"]) == ("active", None)
    unknown = await site.run("key", "origins", "key_unknown")
    assert (unknown.status, "there is no key" in unknown.err) == (1, True)


async def test_key_works_again_within_a_second_of_its_resumption(configure: Configure, dsn: str, sql: Sql) -> None:
    site = configure(dsn)
    key = await site.key()
    async with site.serving():
        assert await site.call(key["secret"]) == (200, "")
        for at, outcome in (("now()", (401, "api_key_suspended")), ("NULL", (200, ""))):
            await sql.execute(f"UPDATE keyproxy.api_keys SET suspended_at = {at}")
            assert await until_called(site, key["secret"], outcome) < CHANGE_SECONDS


async def test_clients_are_in_the_log_in_usage_events_and_in_the_origins_of_a_key(
    configure: Configure, dsn: str, sql: Sql
) -> None:
    site = configure(
        dsn,
        listen={"trusted_proxies": ["127.0.0.1"]},
        log={"client_address": "network"},
        ledger={"settle_seconds": 0.1},
    )
    key = await site.key()
    async with site.serving():
        for address in ("198.51.100.7", "198.51.100.8", "[2001:db8:1:2::3]:4711"):
            assert await from_address(site, key["secret"], address) == 200

        async def are_written() -> bool:
            return bool(await sql.fetchval("SELECT count(*) = 3 FROM keyproxy.usage_events"))

        await until(are_written, "usage events")
        clients = await sql.fetch("SELECT client, count(*) AS count FROM keyproxy.usage_events GROUP BY 1 ORDER BY 1")
        expected = {"198.51.100.0/24": 2, "2001:db8:1::/48": 1}
        assert {row["client"]: row["count"] for row in clients} == expected
        origins = await site.run_json("key", "origins", key["id"], "--since", "1d")
        assert {origin["client"]: origin["requests"] for origin in origins} == expected
        assert {origin["refusals"] for origin in origins} == {0}
    assert {line["client"] for line in site.log()} == set(expected)


async def test_g7_a_signal_suspends_only_the_key_whose_own_traffic_raised_it(
    configure: Configure, dsn: str, sql: Sql
) -> None:
    """Another key from the same network, refused and invalid requests change nothing."""
    site = configure(
        dsn,
        listen={"trusted_proxies": ["127.0.0.1"]},
        anomalies={"watch": ["new_network", "probing", "failures"], "suspend": ["new_network"]},
        routes=[{"match": "POST /v1/ai/jobs", "scopes": ["jobs:write"]}],
    )
    stolen, other = [await site.key(user, scopes=["jobs:write"]) for user in ("u_1", "u_2")]
    unfit = await site.key("u_3")

    async def suspended() -> set[str]:
        rows = await sql.fetch("SELECT id FROM keyproxy.api_keys WHERE suspended_at IS NOT NULL")
        return {row["id"] for row in rows}

    async with site.serving():
        for key in (stolen, other):
            assert await from_address(site, key["secret"], "198.51.100.7") == 200

        async def are_learned() -> bool:
            return bool(await sql.fetchval("SELECT count(*) = 2 FROM keyproxy.key_habits"))

        await until(are_learned, "habits")
        await sql.execute("UPDATE keyproxy.key_habits SET first_seen_at = first_seen_at - interval '25 hours'")
        for _ in range(25):
            assert await from_address(site, unfit["secret"], "203.0.113.9") == 403
        for _ in range(101):
            assert await from_address(site, "kp_live_" + "0" * 49, "203.0.113.9") == 401
        assert await from_address(site, other["secret"], "198.51.100.200") == 200
        assert await suspended() == set()
        assert await from_address(site, stolen["secret"], "203.0.113.9") == 200

        async def is_suspended() -> bool:
            return await suspended() == {stolen["id"]}

        await until(is_suspended, "suspension")

        async def is_refused() -> bool:
            return await from_address(site, stolen["secret"], "203.0.113.9") == 401

        await until(is_refused, "refusal", seconds=CHANGE_SECONDS)
        assert await from_address(site, other["secret"], "198.51.100.7") == 200
        assert await suspended() == {stolen["id"]}
        for kind in ("new_network", "probing", "failures"):
            assert await site.metric("keyproxy_anomalies_total", kind=kind) == 1.0
    rows = await sql.fetch("SELECT payload::text AS payload FROM keyproxy.events WHERE kind = 'key.anomaly'")
    found: dict[str, Any] = {event["signal"]: event for event in (json.loads(row["payload"]) for row in rows)}
    assert {kind: event["key"] for kind, event in found.items()} == {
        "new_network": stolen["id"], "probing": unfit["id"], "failures": None,
    }  # fmt: skip
    assert {kind: event["suspended"] for kind, event in found.items()} == {
        "new_network": True, "probing": False, "failures": False,
    }  # fmt: skip


async def test_velocity_suspends_a_key_only_for_a_limit_of_its_own(configure: Configure, dsn: str, sql: Sql) -> None:
    site = configure(dsn, anomalies={"watch": ["velocity"], "suspend": ["velocity"]}, ledger={"settle_seconds": 0.1})
    own, shared = await site.key("u_1"), await site.key("u_2")
    await sql.execute(
        "INSERT INTO keyproxy.plans (id, limits) VALUES ('tiny', '{\"requests_per_month\": 10}');"
        " UPDATE keyproxy.users SET plan_id = 'tiny' WHERE id = 'u_2'"
    )
    await sql.execute("UPDATE keyproxy.api_keys SET plan_id = 'tiny' WHERE id = $1", own["id"])
    elapsed = await sql.fetchval("SELECT extract(day FROM now() AT TIME ZONE 'UTC') / 28.0 > 0.9 * 0.25")
    async with site.serving():
        for key in (own, shared):
            for _ in range(9):
                await site.call(key["secret"])
        if elapsed:
            # Late in the month, nine tenths are no early use: nothing is raised.
            await asyncio.sleep(1.0)
            assert await sql.fetchval("SELECT count(*) FROM keyproxy.events") == 0
            return

        async def are_reported() -> bool:
            return bool(await sql.fetchval("SELECT count(*) = 2 FROM keyproxy.events WHERE kind = 'key.anomaly'"))

        await until(are_reported, "signals")
        rows = await sql.fetch("SELECT id FROM keyproxy.api_keys WHERE suspended_at IS NOT NULL")
        assert [row["id"] for row in rows] == [own["id"]]
