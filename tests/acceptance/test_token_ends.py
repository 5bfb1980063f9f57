"""Agent tokens end with what they were cut from: new requests within a second, open streams within two."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import asyncpg
import pytest

from tests.acceptance.conftest import Configure, Site, until
from tests.acceptance.test_acting import NO_NOTIFICATIONS
from tests.wire.test_long import REVOKED_SECONDS, stream

ROUTES: list[dict[str, Any]] = [
    {"match": "POST /v1/ai/jobs", "scopes": ["jobs:write"]},
    {"match": "POST /v1/agent-tokens", "scopes": ["agents:mint"], "serves": "agent-tokens"},
]

#: Restores what a cause has changed, and deletes all tokens.
_RESTORE = """
DELETE FROM keyproxy.agent_tokens; DELETE FROM keyproxy.agents;
INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_42', 'acme') ON CONFLICT DO NOTHING;
UPDATE keyproxy.users SET disabled_at = NULL, roles = NULL, tenant_id = 'acme' WHERE id IN ('u_42', 'u_service');
UPDATE keyproxy.tenants SET disabled_at = NULL;
UPDATE keyproxy.api_keys
SET revoked_at = NULL, expires_at = NULL, acts_for = 'tenant', scopes = '{jobs:write,agents:mint}';
"""

#: Causes, and the code of requests afterwards.
CAUSES = [
    ("UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE depth = 1", "api_key_revoked"),
    ("UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE depth = 0", "api_key_revoked"),
    ("UPDATE keyproxy.api_keys SET revoked_at = now()", "api_key_revoked"),
    ("UPDATE keyproxy.api_keys SET expires_at = now()", "api_key_expired"),
    ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_42'", "account_disabled"),
    ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_service'", "account_disabled"),
    ("UPDATE keyproxy.tenants SET disabled_at = now()", "account_disabled"),
    ("UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'parent'", "account_disabled"),
    ("UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'child'", "account_disabled"),
    ("UPDATE keyproxy.api_keys SET acts_for = 'none'", "api_key_invalid"),
    ("DELETE FROM keyproxy.agents WHERE id = 'parent'", "api_key_invalid"),
    ("DELETE FROM keyproxy.users WHERE id = 'u_42'", "api_key_invalid"),
    ("UPDATE keyproxy.api_keys SET scopes = '{agents:mint}'", "insufficient_scope"),
    ("UPDATE keyproxy.agents SET roles = '{}' WHERE id = 'parent'", "insufficient_scope"),
]


async def send(site: Site, target: str, lines: list[str], content: object) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one request."""
    body = json.dumps(content)
    async with site.client() as client:
        head = [f"POST {target} HTTP/1.1", "Host: p", f"Content-Length: {len(body)}", *lines]
        await client.send("\r\n".join([*head, "", body]).encode())
        response = await client.answer()
    return response.status, json.loads(response.body or b"{}")


async def minted(site: Site, secret: str) -> str:
    """A token of the agent `child`, cut from one of `parent`, cut from a key that acts for `u_42`."""
    lines = [f"Authorization: Bearer {secret}", "X-Keyproxy-Act-For: u_42"]
    for agent in ("parent", "child"):
        wish = {"agent": agent, "scopes": ["jobs:write", "agents:mint"]}
        made: list[dict[str, Any]] = []

        async def mints(lines: list[str] = lines, wish: object = wish, made: list[dict[str, Any]] = made) -> bool:
            status, found = await send(site, "/v1/agent-tokens", lines, wish)
            made[:] = [found]
            return status == 201

        await until(mints, f"the token of {agent} is minted", seconds=5.0)
        lines = [f"Authorization: Bearer {made[0]['token']}"]
    token: str = made[0]["token"]
    return token


@pytest.mark.parametrize("notifies", [True, False], ids=["with LISTEN", "without"])
async def test_token_ends_within_a_second_of_its_cause(configure: Configure, dsn: str, notifies: bool) -> None:
    site = configure(dsn, routes=ROUTES, cache={"fresh_seconds": 300, "unknown_seconds": 300})
    key = await site.key("u_service")
    sql = await asyncpg.connect(dsn)
    if not notifies:
        await sql.execute(NO_NOTIFICATIONS)
    async with site.serving():
        for cause, code in CAUSES:
            await sql.execute(_RESTORE)
            token = await minted(site, key["secret"])

            async def code_is(expected: str, token: str = token) -> bool:
                _, found = await send(site, "/v1/ai/jobs", [f"Authorization: Bearer {token}"], {})
                return bool(found.get("code", "") == expected)

            await until(lambda: code_is(""), f"the token works before {cause}", seconds=5.0)
            sent = site.upstream.requests[-1]
            assert [sent.one(f"X-Keyproxy-{name}") for name in ("User", "Actor", "Agent", "Key-Id")] == [
                "u_42", "u_service", "child", key["id"],
            ]  # fmt: skip
            assert sent.one(
                "X-Keyproxy-Token-Id",
            )
            assert not sent.all("Authorization")
            await sql.execute(cause)
            await until(lambda: code_is(code), cause, seconds=1.0)  # noqa: B023 - called before the next cause
    await sql.close()


async def test_open_stream_of_a_token_ends_within_two_seconds_of_its_cause(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, cache={"fresh_seconds": 300, "unknown_seconds": 300})
    key = await site.key("u_service")
    site.upstream.answering = stream
    sql = await asyncpg.connect(dsn)
    async with site.serving():
        for cause, _ in CAUSES:
            await sql.execute(_RESTORE)
            token = await minted(site, key["secret"])
            async with site.client() as client:
                await client.send(
                    f"POST /v1/ai/jobs HTTP/1.1\r\nHost: p\r\nAuthorization: Bearer {token}\r\n"
                    "Content-Length: 2\r\n\r\n{}".encode()
                )
                assert b"200 OK" in await client.reader.readline(), cause
                async with asyncio.timeout(5):
                    await client.reader.readuntil(b"data: 1")
                await sql.execute(cause)
                changed = time.monotonic()
                await client.ends(seconds=REVOKED_SECONDS)
                assert time.monotonic() - changed < REVOKED_SECONDS, cause
    await sql.close()
