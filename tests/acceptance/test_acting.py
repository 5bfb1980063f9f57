"""Service keys that act for users: the decision on every request, and changes by any SQL client."""

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

ROUTES: list[dict[str, Any]] = [
    {"match": "POST /v1/ai/jobs", "scopes": ["jobs:write"]},
    {"match": "POST /v1/admin", "scopes": ["admin:write"]},
    {"match": "GET /public", "access": "public"},
]


#: `note_change` as it is, but without notifications.
NO_NOTIFICATIONS = """
CREATE OR REPLACE FUNCTION keyproxy.note_change(kind text, subject text) RETURNS void LANGUAGE sql
SET search_path = pg_catalog, pg_temp AS 'INSERT INTO keyproxy.changes (kind, subject) VALUES (kind, subject)'
"""

_SETUP = """
INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_42', 'acme'), ('u_off', 'acme'), ('u_limited', 'acme');
UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_off';
INSERT INTO keyproxy.tenants (id) VALUES ('globex');
INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_other', 'globex');
INSERT INTO keyproxy.plans (id, limits) VALUES ('none', '{"requests_per_day": 0}');
UPDATE keyproxy.users SET plan_id = 'none' WHERE id = 'u_limited';
"""


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[Sql]:
    """A connection of any SQL client."""
    connection: Sql = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


async def issue(site: Site, sql: Sql, user: str, *, acts: bool = True) -> str:
    """A key of a user of `acme` with the scope `jobs:write`; returns its secret."""
    key = await site.key(user, scopes=["jobs:write"])
    await sql.execute(
        "UPDATE keyproxy.api_keys SET acts_for = $1 WHERE id = $2", "tenant" if acts else "none", key["id"]
    )
    secret: str = key["secret"]
    return secret


async def call(site: Site, lines: list[str], target: str = "POST /v1/ai/jobs") -> tuple[int, dict[str, Any]]:
    """Status and problem of one request with these header lines; the problem is empty if the upstream responded."""
    async with site.client() as client:
        head = "".join(f"{line}\r\n" for line in [f"{target} HTTP/1.1", "Host: p", "Content-Length: 2", *lines])
        await client.send(head.encode("latin-1") + b"\r\n{}")
        response = await client.answer(method=target.partition(" ")[0])
    return response.status, json.loads(response.body) if response.status >= 400 else {}


#: Act-For more than once, or named in Connection.
_DOUBLED = [
    ["X-Keyproxy-Act-For: u_42", "X-Keyproxy-Act-For: u_42"],
    ["X-Keyproxy-Act-For: u_42", "x_keyproxy_act_for: u_42"],
    ["X-Keyproxy-Act-For: u_42", "X-KEYPROXY-ACT-FOR: u_43"],
    ["X-Keyproxy-Act-For: u_42", "Connection: X-Keyproxy-Act-For"],
    ["X-Keyproxy-Act-For: ", "X-Keyproxy-Act-For: "],
]
_SPELLINGS = ["X-Keyproxy-Act-For", "x-keyproxy-act-for", "X_Keyproxy_Act_For", "x-KEYPROXY_act-FOR"]
_UNUSABLE = ["", "   ", "-bad", "two words", "u_unknown", "u_other", "u_off", "a" * 129, "\xfc"]

#: Credential, Act-For lines, target, status and code; as the test below names the credentials.
DECISIONS: list[tuple[str, list[str], str, int, str]] = [
    *[
        (key, lines, "POST /v1/ai/jobs", 400, "request_malformed")
        for lines in _DOUBLED
        for key in ("service", "revoked", "")
    ],
    *[
        (key, lines, target, 401, code)
        for key, code in [
            ("", "api_key_missing"), ("unknown", "api_key_invalid"), ("malformed", "api_key_invalid"),
            ("expired", "api_key_expired"), ("revoked", "api_key_revoked"), ("disabled", "account_disabled"),
            ("tenant", "account_disabled"),
        ]
        for lines in ([], ["X-Keyproxy-Act-For: u_42"], ["X-Keyproxy-Act-For: u_other"], ["X-Keyproxy-Act-For: "])
        for target in ("POST /v1/ai/jobs", "POST /v1/admin", "POST /nowhere")
    ],
    *[(key, [], "POST /v1/ai/jobs", 200, "") for key in ("service", "plain")],
    *[
        ("plain", [f"X-Keyproxy-Act-For: {user}"], target, 403, "delegation_refused")
        for user in ["u_42", "u_plain", *_UNUSABLE]
        for target in ("POST /v1/ai/jobs", "POST /nowhere")
    ],
    *[
        ("service", [f"X-Keyproxy-Act-For: {user}"], target, 403, "delegation_refused")
        for user in _UNUSABLE
        for target in ("POST /v1/ai/jobs", "POST /v1/admin", "POST /nowhere")
    ],
    ("service", ["X-Keyproxy-Act-For: u_42"], "POST /nowhere", 403, "route_not_allowed"),
    ("service", ["X-Keyproxy-Act-For: u_limited"], "POST /nowhere", 403, "route_not_allowed"),
    ("service", ["X-Keyproxy-Act-For: u_42"], "POST /v1/admin", 403, "insufficient_scope"),
    ("service", ["X-Keyproxy-Act-For: u_limited"], "POST /v1/admin", 403, "insufficient_scope"),
    ("service", ["X-Keyproxy-Act-For: u_limited"], "POST /v1/ai/jobs", 429, "quota_exhausted"),
    *[("service", [f"{name}: u_42"], "POST /v1/ai/jobs", 200, "") for name in _SPELLINGS],
    ("service", ["X-Keyproxy-Act-For:   u_42 \t"], "POST /v1/ai/jobs", 200, ""),
    ("service", ["X-Keyproxy-Act-For: u_service"], "POST /v1/ai/jobs", 200, ""),
    ("", ["X-Keyproxy-Act-For: u_other"], "GET /public", 200, ""),
]  # fmt: skip


async def test_first_condition_that_applies_decides(configure: Configure, dsn: str, sql: Sql) -> None:
    site = configure(dsn, routes=ROUTES, cache={"fresh_seconds": 300})
    secrets = {name: await issue(site, sql, f"u_{name}") for name in ("service", "expired", "revoked", "disabled")}
    secrets["plain"] = await issue(site, sql, "u_plain", acts=False)
    tenant = await site.key("u_tenant", scopes=["jobs:write"], tenant="dead")
    secrets |= {"tenant": tenant["secret"], "malformed": "kp_live_x", "": ""}
    forgotten = await site.key("u_forgotten")
    secrets["unknown"] = forgotten["secret"]
    await sql.execute("DELETE FROM keyproxy.api_keys WHERE id = $1", forgotten["id"])
    await sql.execute("UPDATE keyproxy.api_keys SET acts_for = 'tenant' WHERE user_id = 'u_tenant'")
    await sql.execute("UPDATE keyproxy.api_keys SET expires_at = now() WHERE user_id = 'u_expired'")
    await sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE user_id = 'u_revoked'")
    await sql.execute("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_disabled'")
    await sql.execute("UPDATE keyproxy.tenants SET disabled_at = now() WHERE id = 'dead'")
    await sql.execute(_SETUP)
    refusals = set()
    async with site.serving():
        # Twice: looked up, and from memory.
        for _ in range(2):
            for name, lines, target, status, code in DECISIONS:
                case = (name, lines, target)
                credential = [f"Authorization: Api-Key {secrets[name]}"] if secrets[name] else []
                before = len(site.upstream.requests)
                found, problem = await call(site, [*credential, *lines], target)
                assert (found, problem.get("code", "")) == (status, code), case
                assert len(site.upstream.requests) - before == (1 if status == 200 else 0), case
                if code == "delegation_refused":
                    refusals.add(json.dumps({**problem, "request_id": ""}, sort_keys=True))
                elif status == 200 and name == "service":
                    sent = site.upstream.requests[-1]
                    user = lines[0].partition(":")[2].strip() if lines else "u_service"
                    assert sent.one("X-Keyproxy-User") == user
                    assert sent.all("X-Keyproxy-Actor") == (["u_service"] if lines else [])
                    assert not sent.all("X-Keyproxy-Act-For")
                    assert not sent.all("X_Keyproxy_Act_For")
    assert len(refusals) == 1, "one body for all, apart from the request id"


#: A change, the code of requests afterwards, and its reverse.
CHANGES = [
    (
        "UPDATE keyproxy.api_keys SET acts_for = 'none'", "delegation_refused",
        "UPDATE keyproxy.api_keys SET acts_for = 'tenant'",
    ),
    (
        "UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_42'", "delegation_refused",
        "UPDATE keyproxy.users SET disabled_at = NULL WHERE id = 'u_42'",
    ),
    (
        "UPDATE keyproxy.users SET tenant_id = 'globex' WHERE id = 'u_42'", "delegation_refused",
        "UPDATE keyproxy.users SET tenant_id = 'acme' WHERE id = 'u_42'",
    ),
    (
        "DELETE FROM keyproxy.users WHERE id = 'u_42'", "delegation_refused",
        "INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_42', 'acme')",
    ),
    (
        "UPDATE keyproxy.users SET id = 'u_41' WHERE id = 'u_42'", "delegation_refused",
        "UPDATE keyproxy.users SET id = 'u_42' WHERE id = 'u_41'",
    ),
    (
        "UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_service'", "account_disabled",
        "UPDATE keyproxy.users SET disabled_at = NULL WHERE id = 'u_service'",
    ),
    (
        "UPDATE keyproxy.tenants SET disabled_at = now() WHERE id = 'acme'", "account_disabled",
        "UPDATE keyproxy.tenants SET disabled_at = NULL WHERE id = 'acme'",
    ),
    (
        "UPDATE keyproxy.api_keys SET revoked_at = now()", "api_key_revoked",
        "UPDATE keyproxy.api_keys SET revoked_at = NULL",
    ),
    (
        "UPDATE keyproxy.users SET roles = '{nothing}' WHERE id = 'u_42'", "insufficient_scope",
        "UPDATE keyproxy.users SET roles = NULL WHERE id = 'u_42'",
    ),
    (
        "UPDATE keyproxy.users SET plan_id = 'none' WHERE id = 'u_42'", "quota_exhausted",
        "UPDATE keyproxy.users SET plan_id = NULL WHERE id = 'u_42'",
    ),
]  # fmt: skip


@pytest.mark.parametrize("notifies", [True, False], ids=["with LISTEN", "without"])
async def test_change_takes_effect_on_acting_requests_within_a_second_in_both_directions(
    configure: Configure, dsn: str, sql: Sql, notifies: bool
) -> None:
    site = configure(dsn, routes=ROUTES, cache={"fresh_seconds": 300, "unknown_seconds": 300})
    secret = await issue(site, sql, "u_service")
    if not notifies:
        await sql.execute(NO_NOTIFICATIONS)
    await sql.execute(_SETUP)
    lines = [f"Authorization: Api-Key {secret}", "X-Keyproxy-Act-For: u_42"]

    async def has_code(code: str) -> bool:
        _, problem = await call(site, lines)
        return bool(problem.get("code", "") == code)

    async with site.serving():
        await until(lambda: has_code(""), "the key acts", seconds=5.0)
        for change, code, reverse in CHANGES:
            for statement, expected in ((change, code), (reverse, "")):
                await sql.execute(statement)
                await until(lambda expected=expected: has_code(expected), statement, seconds=1.0)  # type: ignore[misc]


async def test_open_stream_of_an_acting_key_ends_within_two_seconds_of_a_change(
    configure: Configure, dsn: str, sql: Sql
) -> None:
    site = configure(dsn, routes=ROUTES, cache={"fresh_seconds": 300, "unknown_seconds": 300})
    secret = await issue(site, sql, "u_service")
    await sql.execute(_SETUP)
    site.upstream.answering = stream
    head = (
        f"POST /v1/ai/jobs HTTP/1.1\r\nHost: p\r\nAuthorization: Api-Key {secret}\r\nX-Keyproxy-Act-For: u_42\r\n"
        "Content-Length: 2\r\n\r\n{}"
    )
    async with site.serving():
        for change, code, reverse in CHANGES:
            if code == "quota_exhausted":
                continue  # a plan does not end what it admitted
            async with site.client() as client:
                await client.send(head.encode())
                assert b"200 OK" in await client.reader.readline(), change
                async with asyncio.timeout(5):
                    await client.reader.readuntil(b"data: 1")
                await sql.execute(change)
                changed = time.monotonic()
                await client.ends(seconds=REVOKED_SECONDS)
                assert time.monotonic() - changed < REVOKED_SECONDS, change
            await sql.execute(reverse)

            async def acts() -> bool:
                async with site.client() as client:
                    await client.send(head.encode())
                    return b"200 OK" in await client.reader.readline()

            await until(acts, f"the key acts after {reverse}", seconds=5.0)


#: Changes after which the key still works, and acts, but for another user or tenant than before.
MOVES = [
    "UPDATE keyproxy.users SET tenant_id = 'globex' WHERE id IN ('u_service', 'u_42')",
    "UPDATE keyproxy.tenants SET id = 'acme2' WHERE id = 'acme'",
    "UPDATE keyproxy.users SET id = 'u_renamed' WHERE id = 'u_service'",
    "UPDATE keyproxy.api_keys SET user_id = 'u_limited'",
    "UPDATE keyproxy.api_keys SET is_test = true",
]


@pytest.mark.parametrize("move", MOVES)
async def test_open_stream_ends_when_its_credential_comes_to_stand_for_another_user_or_tenant(
    configure: Configure, dsn: str, sql: Sql, move: str
) -> None:
    site = configure(dsn, routes=ROUTES, cache={"fresh_seconds": 300})
    secret = await issue(site, sql, "u_service")
    await sql.execute(_SETUP)
    await sql.execute("UPDATE keyproxy.users SET plan_id = NULL")
    site.upstream.answering = stream
    head = f"POST /v1/ai/jobs HTTP/1.1\r\nHost: p\r\nX-Api-Key: {secret}\r\nContent-Length: 2\r\n"
    heads = [f"{head}{act_for}\r\n{{}}".encode() for act_for in ("", "X-Keyproxy-Act-For: u_42\r\n")]
    async with site.serving():
        async with site.client() as plain, site.client() as acting:
            for client, sent in zip((plain, acting), heads, strict=True):
                await client.send(sent)
                async with asyncio.timeout(5):
                    await client.reader.readuntil(b"data: 1")
            await sql.execute(move)
            changed = time.monotonic()
            await asyncio.gather(*(client.ends(seconds=REVOKED_SECONDS) for client in (plain, acting)))
            assert time.monotonic() - changed < REVOKED_SECONDS
        for sent in heads:
            async with site.client() as client:
                await client.send(sent)
                assert b"200 OK" in await client.reader.readline(), "a new request concerns the new user"
