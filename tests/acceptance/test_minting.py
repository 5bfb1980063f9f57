"""Agent tokens over HTTP, with real processes and a real PostgreSQL: what is minted, refused, charged and recorded."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import socket
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import jwt
import pytest

from tests.acceptance.conftest import Configure, Site, until
from tests.rawhttp import Client, Message
from tests.store.harness import Relay

PATH = "/v1/agent-tokens"
ROUTES: list[dict[str, Any]] = [
    {"match": f"POST {PATH}", "scopes": ["agents:mint"], "serves": "agent-tokens"},
    {"match": "POST /v1/ai/jobs", "scopes": ["jobs:write"]},
    {"match": "* /{rest...}"},
]
SCOPES = ("agents:mint", "data:read", "jobs:write")
ASKED: dict[str, Any] = {"agent": "crawler", "role": "reader"}
#: With a short lease, a pause of the machine could forfeit what was granted, and the numbers would not be exact.
LEDGER = {"settle_seconds": 0.1}


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of another SQL client."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('reader', '{data:read}')")
    yield connection
    await connection.close()


@pytest.fixture
def site(configure: Configure, dsn: str) -> Site:
    """A site with a route that mints."""
    return configure(dsn, routes=ROUTES, ledger=LEDGER)


def request(secret: str, asked: object = ASKED, *lines: str, path: str = PATH) -> bytes:
    body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    head = [
        f"POST {path} HTTP/1.1",
        "Host: p",
        f"Authorization: Bearer {secret}",
        f"Content-Length: {len(body)}",
        *lines,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def call(site: Site, secret: str, asked: object = ASKED, *lines: str, path: str = PATH) -> Message:
    async with site.client() as client:
        await client.send(request(secret, asked, *lines, path=path))
        return await client.answer(seconds=30)


async def code(site: Site, secret: str, asked: object = ASKED, *lines: str, path: str = PATH) -> str:
    response = await call(site, secret, asked, *lines, path=path)
    content = json.loads(response.body or b"{}")
    return str(content.get("code", response.status))


async def minted(site: Site, secret: str, **members: Any) -> dict[str, Any]:
    response = await call(site, secret, {**ASKED, **members})
    assert response.status == 201, response.body
    content: dict[str, Any] = json.loads(response.body)
    return content


async def tokens(sql: asyncpg.Connection) -> int:
    return int(await sql.fetchval("SELECT count(*) FROM keyproxy.agent_tokens"))


async def plan(sql: asyncpg.Connection, limits: dict[str, int]) -> None:
    await sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', $1)", json.dumps(limits))
    await sql.execute("UPDATE keyproxy.users SET plan_id = 'p'")


async def until_spent(sql: asyncpg.Connection, spent: int) -> None:
    """Wait until the window of the user has exactly this much spent, and nothing held."""
    row: asyncpg.Record | None = None

    async def is_spent() -> bool:
        nonlocal row
        await sql.execute("SELECT keyproxy.reap_holders()")
        row = await sql.fetchrow(
            "SELECT spent, forfeited, held FROM keyproxy.windows WHERE measure = 'requests_per_day'"
        )
        return row is not None and (row["spent"] - row["forfeited"], row["held"]) == (spent, 0)

    try:
        await until(is_spent, seconds=20.0)
    except AssertionError:
        raise AssertionError(f"{spent} requests are not what was spent: {row}") from None


@contextlib.asynccontextmanager
async def locked(sql: asyncpg.Connection) -> AsyncIterator[None]:
    """Keys that are locked: a mint waits for them."""
    async with sql.transaction():
        await sql.execute("SELECT FROM keyproxy.api_keys FOR UPDATE")
        yield


def reset(client: Client) -> None:
    """Leave without reading: a client that only closes its side may still be reading."""
    sock = client.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


async def until_waiting(dsn: str) -> None:
    """Wait until a mint waits for a lock."""
    watching = await asyncpg.connect(dsn)
    try:

        async def waits() -> bool:
            return bool(
                await watching.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%mint%'"
                )
            )

        await until(waits, "a mint waits", seconds=10.0)
    finally:
        await watching.close()


async def test_minted_token_verifies_works_and_only_its_digest_is_stored(site: Site, sql: asyncpg.Connection) -> None:
    key = await site.key(scopes=SCOPES)
    async with site.serving():
        asked = {"agent": "crawler", "scopes": ["jobs:write"], "token_budget": 10_000, "request_budget": 5}
        response = await call(site, key["secret"], asked)
        assert (response.status, response.one("Cache-Control")) == (201, "no-store")
        content = json.loads(response.body)
        token = content["token"]
        jwks = jwt.PyJWKSet.from_json((await site.ops("/jwks.json"))[1])
        signing_key = next(one for one in jwks.keys if one.key_id == jwt.get_unverified_header(token)["kid"])
        claims = jwt.decode(token, signing_key, algorithms=["ES256"], audience="keyproxy", issuer="keyproxy")
        assert {name: claims[name] for name in ("sub", "tenant", "client_id", "scope", "token_budget", "jti", "act")} == {
            "sub": "u_42", "tenant": "acme", "client_id": key["id"], "scope": "jobs:write", "token_budget": 10_000,
            "jti": content["id"], "act": {"sub": "crawler", "type": "agent"},
        }  # fmt: skip
        assert await code(site, token, {}, path="/v1/ai/jobs") == "200"
        forwarded = site.upstream.requests[-1]
        assert (forwarded.one("X-Keyproxy-Agent"), forwarded.one("X-Keyproxy-Token-Id")) == ("crawler", content["id"])
        assert forwarded.one("X-Keyproxy-Scope") == "jobs:write"
        row = await sql.fetchrow("SELECT * FROM keyproxy.agent_tokens")
        assert row is not None
        assert (row["id"], row["digest"]) == (content["id"], hashlib.sha256(token.encode()).digest())
        assert (row["root_key_id"], row["request_budget"], row["depth"]) == (key["id"], 5, 0)
        audit = await sql.fetch("SELECT * FROM keyproxy.audit_log WHERE entity = 'agent_token'")
        assert [one["actor"] for one in audit] == [f"key:{key['id']}"]
        assert token not in str([dict(one) for one in audit]) + (await site.ops("/metrics"))[1]
    assert all(token.encode() not in part for part in site.printed)


async def test_refusals_are_the_documented_ones_and_leave_no_row(site: Site, sql: asyncpg.Connection) -> None:
    key = await site.key(scopes=SCOPES)
    async with site.serving():
        for asked, expected in [
            ({**ASKED, "ttl_seconds": 901}, "request_malformed"),
            ({**ASKED, "token_budget": -1}, "request_malformed"),
            ({**ASKED, "audience": "upstream"}, "request_malformed"),
            (b'{"agent":"a","role":"reader","role":"reader"}', "request_malformed"),
            ({"agent": "crawler", "scopes": ["data:write"]}, "delegation_refused"),
            ({"agent": "crawler", "scopes": []}, "delegation_refused"),
            ({"agent": "crawler", "role": "unknown"}, "delegation_refused"),
            (b" " * 16_385, "body_too_large"),
        ]:
            assert await code(site, key["secret"], asked) == expected, asked
        assert (await site.call(key["secret"], "GET", PATH))[0] == 200
        await sql.execute("INSERT INTO keyproxy.agents (user_id, id, disabled_at) VALUES ('u_42', 'off', now())")
        assert await code(site, key["secret"], {**ASKED, "agent": "off"}) == "delegation_refused"
        assert await tokens(sql) == 0
        assert await sql.fetchval("SELECT count(*) FROM keyproxy.agents") == 1


async def test_tokens_of_tokens_only_shrink(site: Site, sql: asyncpg.Connection) -> None:
    key = await site.key(scopes=SCOPES)
    async with site.serving():
        above = {"role": None, "scopes": ["agents:mint", "data:read"], "token_budget": 10, "ttl_seconds": 300}
        parent = await minted(site, key["secret"], **above)
        wrong: list[dict[str, Any]] = [
            {"token_budget": 11}, {"ttl_seconds": 301}, {"role": None, "scopes": ["jobs:write"]},
        ]  # fmt: skip
        for members in wrong:
            assert await code(site, parent["token"], {**ASKED, **members}) == "delegation_refused", members
        child = await minted(site, parent["token"], agent="child", role=None, scopes=["agents:mint"], token_budget=10)
        assert (child["depth"], child["user"]) == (1, "u_42")
        assert child["expires_at"] <= parent["expires_at"]
        beyond = {"agent": "grandchild", "scopes": ["agents:mint"]}
        assert await code(site, child["token"], beyond) == "delegation_refused"
        audit = await sql.fetch("SELECT actor FROM keyproxy.audit_log WHERE entity = 'agent_token' ORDER BY id")
        assert [one["actor"] for one in audit] == [f"key:{key['id']}", f"agent_token:{parent['id']}"]
        await site.run_json("key", "revoke", key["id"])

        async def is_dead() -> bool:
            return await code(site, child["token"], {}, path="/other") == "api_key_revoked"

        await until(is_dead, "the child dies with the root key", seconds=1.0)


async def test_key_that_acts_mints_for_the_user_it_acts_for(site: Site, sql: asyncpg.Connection) -> None:
    worker = await site.key("u_worker", scopes=SCOPES)
    await site.key("u_42")
    await sql.execute("UPDATE keyproxy.api_keys SET acts_for = 'tenant' WHERE id = $1", worker["id"])
    async with site.serving():
        response = await call(site, worker["secret"], ASKED, "X-Keyproxy-Act-For: u_42")
        content = json.loads(response.body)
        assert (response.status, content["user"]) == (201, "u_42")
        claims = jwt.decode(content["token"], options={"verify_signature": False})
        assert claims["act"] == {
            "sub": "crawler", "type": "agent", "act": {"sub": "u_worker", "type": "user", "key_id": worker["id"]},
        }  # fmt: skip
        row = await sql.fetchrow("SELECT * FROM keyproxy.agent_tokens")
        assert row is not None
        assert (row["user_id"], row["actor_user_id"], row["root_key_id"]) == ("u_42", "u_worker", worker["id"])
        assert await code(site, worker["secret"], ASKED, "X-Keyproxy-Act-For: u_nobody") == "delegation_refused"
        assert await tokens(sql) == 1


async def test_201_is_charged_once_and_a_refusal_not_at_all(site: Site, sql: asyncpg.Connection) -> None:
    key = await site.key(scopes=SCOPES)
    await plan(sql, {"requests_per_day": 100})
    async with site.serving():
        for left in (99, 98):
            response = await call(site, key["secret"], ASKED, "Idempotency-Key: one")
            assert (response.one("RateLimit") or "").startswith(f'"user.requests_per_day";r={left};t=')
        for asked in (
            {**ASKED, "ttl_seconds": 901},
            {"agent": "a", "scopes": ["x:y"]},
            {"agent": "a", "role": "unknown"},
        ):
            assert (await call(site, key["secret"], asked)).status in (400, 403)
    await until_spent(sql, 2)
    rows = await site.run_json("usage", "show", "--by", "route")
    assert [(row["route"], row["requests"], row["refusals"]) for row in rows] == [(f"POST {PATH}", 2, 3)]
    lines = [(line["status"], line["code"]) for line in site.log()]
    assert lines.count((201, "ok")) == 2


async def test_number_of_live_tokens_is_bounded_and_the_refusal_names_when_one_ends(
    configure: Configure, dsn: str, sql: asyncpg.Connection
) -> None:
    site = configure(dsn, routes=ROUTES, access={"agent_tokens_max": 1})
    key = await site.key(scopes=SCOPES)
    async with site.serving():
        first = await minted(site, key["secret"], ttl_seconds=60)
        response = await call(site, key["secret"])
        content = json.loads(response.body)
        assert (response.status, content["code"], content["policy"]) == (429, "quota_exhausted", "key.agent_tokens")
        assert 50 <= int(response.one("Retry-After") or 0) <= 60
        assert content["retryable"] is True
        await sql.execute("UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE id = $1", first["id"])
        await minted(site, key["secret"])


async def test_store_that_is_down_is_503_and_what_memory_knows_is_still_refused_as_such(
    configure: Configure, dsn: str, sql: asyncpg.Connection
) -> None:
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        relay = Relay(Path(directory), dsn)
        await relay.mend()
        site = configure(relay.dsn, routes=ROUTES, store={"statement_timeout_seconds": 1.0})
        key = await Site.key(configure(dsn, routes=ROUTES), scopes=SCOPES)
        site = configure(relay.dsn, routes=ROUTES, store={"statement_timeout_seconds": 1.0})
        async with site.serving():
            await minted(site, key["secret"])
            await relay.cut()
            assert await code(site, key["secret"]) == "store_unavailable"
            assert await code(site, key["secret"], {**ASKED, "token_budget": -1}) == "request_malformed"
            assert await code(site, key["secret"], {"agent": "a", "scopes": ["data:write"]}) == "delegation_refused"
            await relay.mend()

            async def mints() -> bool:
                return (await call(site, key["secret"])).status == 201

            await until(mints, "minting recovers", seconds=10.0)
        assert await tokens(sql) == 2
        await relay.cut()


async def test_client_that_leaves_is_charged_if_and_only_if_the_token_exists(
    site: Site, dsn: str, sql: asyncpg.Connection
) -> None:
    key = await site.key(scopes=SCOPES)
    await plan(sql, {"requests_per_day": 100})
    async with site.serving():
        await minted(site, key["secret"])
        async with locked(sql), site.client() as client:
            await client.send(request(key["secret"]))
            await until_waiting(dsn)
            reset(client)
            await asyncio.sleep(0.2)
        await until(lambda: any(line["status"] == 499 for line in site.log()), "the exchange has ended", seconds=10.0)
    exists = await tokens(sql)
    assert exists == 2
    await until_spent(sql, exists)
    rows = await site.run_json("usage", "show")
    assert sum(row["requests"] for row in rows) == exists


async def test_mint_that_cannot_be_decided_in_time_is_refused_and_costs_nothing(
    site: Site, sql: asyncpg.Connection
) -> None:
    key = await site.key(scopes=SCOPES)
    await plan(sql, {"requests_per_day": 100})
    async with site.serving():
        await minted(site, key["secret"])
        async with locked(sql):
            response = await call(site, key["secret"])
        assert (response.status, json.loads(response.body)["code"]) == (503, "store_unavailable")
    assert await tokens(sql) == 1
    await until_spent(sql, 1)


async def test_sigterm_during_a_mint_lets_it_finish(site: Site, dsn: str, sql: asyncpg.Connection) -> None:
    key = await site.key(scopes=SCOPES)
    await plan(sql, {"requests_per_day": 100})
    async with site.serving() as process, site.client() as client:
        async with locked(sql):
            await client.send(request(key["secret"]))
            await until_waiting(dsn)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
        response = await client.answer(seconds=30)
        assert (response.status, response.one("Connection")) == (201, "close")
    assert await tokens(sql) == 1
    await until_spent(sql, 1)


async def test_sigkill_during_a_mint_charges_at_most_one_request_and_strands_nothing(
    configure: Configure, dsn: str, sql: asyncpg.Connection
) -> None:
    site = configure(dsn, routes=ROUTES, ledger={"lease_seconds": 1.0})
    key = await site.key(scopes=SCOPES)
    await plan(sql, {"requests_per_day": 100})
    async with site.serving() as process, site.client() as client:
        async with locked(sql):
            await client.send(request(key["secret"]))
            await until_waiting(dsn)
            process.kill()
            await client.ends()
            await process.wait()

        async def is_quiet() -> bool:
            await sql.execute("SELECT keyproxy.reap_holders()")
            return bool(await sql.fetchval("SELECT coalesce(sum(held), 0) = 0 FROM keyproxy.windows"))

        await until(is_quiet, "nothing is held", seconds=20.0)
    async with site.serving():
        await minted(site, key["secret"])
    assert await tokens(sql) <= 2


async def test_reload_applies_new_bounds_and_a_mint_in_flight_finishes(
    configure: Configure, dsn: str, sql: asyncpg.Connection
) -> None:
    site = configure(dsn, routes=ROUTES, ledger=LEDGER)
    key = await site.key(scopes=SCOPES)
    await plan(sql, {"requests_per_day": 100})
    async with site.serving() as process, site.client() as client:
        assert await code(site, key["secret"], {**ASKED, "ttl_seconds": 900}) == "201"
        async with locked(sql):
            await client.send(request(key["secret"]))
            await until_waiting(dsn)
            # The other size of the pool makes it another store.
            changed = "[access]\nagent_ttl_seconds = 60\n[store]\npool_size_max = 5"
            site.config.write_text(site.config.read_text().replace("[store]", changed))
            process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.3)
        assert (await client.answer(seconds=30)).status == 201

        async def is_bounded() -> bool:
            return await code(site, key["secret"], {**ASKED, "ttl_seconds": 61}) == "request_malformed"

        await until(is_bounded, "the new bound applies", seconds=10.0)
    exists = await tokens(sql)
    await until_spent(sql, exists)


async def test_workers_mint_for_one_another(configure: Configure, dsn: str, sql: asyncpg.Connection) -> None:
    site = configure(dsn, routes=ROUTES, listen={"workers": 2}, ledger=LEDGER)
    key = await site.key(scopes=SCOPES)
    await plan(sql, {"requests_per_day": 1_000})
    async with site.serving() as process:
        await site.until_ready(process)
        made = await asyncio.gather(*(minted(site, key["secret"], agent=f"a{n}") for n in range(12)))
        kinds = await asyncio.gather(*(code(site, one["token"], {}, path="/other") for one in made))
        assert kinds == ["200"] * 12
        kids = {jwt.get_unverified_header(one["token"])["kid"] for one in made}
        assert len(kids) == 1
    await until_spent(sql, 24)
