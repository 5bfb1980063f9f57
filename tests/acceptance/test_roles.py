"""Changes of roles, ceilings and scopes by any SQL client: new requests within a second, open streams within two."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import asyncpg
import pytest

from tests.acceptance.conftest import Configure, until
from tests.wire.test_long import REVOKED_SECONDS, stream

ROUTES: list[dict[str, Any]] = [{"match": "POST /v1/ai/jobs", "scopes": ["jobs:write"]}]

#: A key that may write jobs by a role, below ceilings of its user and tenant that allow it.
_SETUP = """
INSERT INTO keyproxy.roles (id, scopes) VALUES ('writer', '{jobs:write}'), ('all', '{jobs:write,jobs:read}');
UPDATE keyproxy.api_keys SET roles = '{writer}';
UPDATE keyproxy.users SET roles = '{all}';
UPDATE keyproxy.tenants SET roles = '{all}';
"""

#: Changes after which it may not.
NARROWING = [
    "UPDATE keyproxy.api_keys SET roles = '{}'",
    "UPDATE keyproxy.roles SET scopes = '{jobs:read}' WHERE id = 'writer'",
    "UPDATE keyproxy.roles SET scopes = '{jobs:read}' WHERE id = 'all'",
    "DELETE FROM keyproxy.roles WHERE id = 'writer'",
    "DELETE FROM keyproxy.roles WHERE id = 'all'",
    "UPDATE keyproxy.users SET roles = '{}'",
    "UPDATE keyproxy.tenants SET roles = '{unknown}'",
]

#: `note_change` as it is, but without notifications.
_NO_NOTIFICATIONS = """
CREATE OR REPLACE FUNCTION keyproxy.note_change(kind text, subject text) RETURNS void LANGUAGE sql
SET search_path = pg_catalog, pg_temp AS 'INSERT INTO keyproxy.changes (kind, subject) VALUES (kind, subject)'
"""


@pytest.mark.parametrize("notifies", [True, False], ids=["with LISTEN", "without"])
async def test_change_of_roles_and_ceilings_takes_effect_within_a_second(
    configure: Configure, dsn: str, notifies: bool
) -> None:
    site = configure(dsn, routes=ROUTES, cache={"fresh_seconds": 300})
    key = await site.key()
    sql = await asyncpg.connect(dsn)
    if not notifies:
        await sql.execute(_NO_NOTIFICATIONS)
    await sql.execute(_SETUP)

    async def has_code(code: str) -> bool:
        return (await site.call(key["secret"]))[1] == code

    async with site.serving():
        assert await site.call(key["secret"]) == (200, "")
        assert site.upstream.requests[-1].one("X-Keyproxy-Scope") == "jobs:write"
        for statement in NARROWING:
            await sql.execute(statement)
            await until(lambda: has_code("insufficient_scope"), statement, seconds=1.0)
            await sql.execute("DELETE FROM keyproxy.roles")
            await sql.execute(_SETUP)
            await until(lambda: has_code(""), f"recovery from {statement}", seconds=1.0)
    await sql.close()


async def test_open_stream_ends_within_two_seconds_of_a_change_of_roles_and_ceilings(
    configure: Configure, dsn: str
) -> None:
    site = configure(dsn, routes=ROUTES, cache={"fresh_seconds": 300})
    key = await site.key()
    site.upstream.answering = stream
    sql = await asyncpg.connect(dsn)
    await sql.execute(_SETUP)
    head = (
        f"POST /v1/ai/jobs HTTP/1.1\r\nHost: p\r\nAuthorization: Api-Key {key['secret']}\r\nContent-Length: 2\r\n\r\n"
    )
    sent = head.encode() + b"{}"
    async with site.serving():
        for statement in NARROWING:
            async with site.client() as client:
                await client.send(sent)
                assert b"200 OK" in await client.reader.readline()
                async with asyncio.timeout(5):
                    await client.reader.readuntil(b"data: 1")
                await sql.execute(statement)
                changed = time.monotonic()
                await client.ends(seconds=REVOKED_SECONDS)
                assert time.monotonic() - changed < REVOKED_SECONDS, statement
            await sql.execute("DELETE FROM keyproxy.roles")
            await sql.execute(_SETUP)

            async def is_allowed() -> bool:
                async with site.client() as client:
                    await client.send(sent)
                    return b"200 OK" in await client.reader.readline()

            await until(is_allowed, "the key is allowed again", seconds=5.0)
    await sql.close()
