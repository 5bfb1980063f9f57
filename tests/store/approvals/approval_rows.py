"""Approvals by raw SQL, as proxies and approvers make them, for tests of what reads them."""

from __future__ import annotations

import secrets
from typing import Any

import asyncpg

from tests.store.harness import Sql, add_key, add_user

DIGEST = b"d" * 32

_CLAIM = (
    "SELECT outcome, approval_id, expires_at, waited_seconds"
    " FROM keyproxy.claim_approval($1, $2, $3, $4, $5, $6, $7, $8, $9::text::jsonb, $10, $11, $12, $13)"
)


def new_claim() -> bytes:
    """A random claim, as proxies choose."""
    return secrets.token_bytes(16)


async def add_owner(sql: Sql) -> None:
    """Insert u_42 of acme with key_1, whose hint is `kp_live_…aaaa`."""
    await add_user(sql)
    await add_key(sql)
    await sql.execute("UPDATE keyproxy.api_keys SET hint = 'kp_live_…aaaa'")


async def claim(sql: Sql, digest: bytes = DIGEST, **changes: Any) -> asyncpg.Record:
    """Claim the approval of a call of u_42 to `pay`, with these changes."""
    values: dict[str, Any] = {
        "id": "apr_" + secrets.token_hex(11), "digest": digest, "tenant": "acme", "user": "u_42", "key": "key_1",
        "agent": "crawler", "kind": "human", "tool": "pay", "summary": '{"tool": "pay"}', "client": "192.0.2.1",
        "claim": new_claim(), "pending_seconds": 900.0, "pending_max": 20,
    }  # fmt: skip
    assert set(changes) <= set(values)
    row = await sql.fetchrow(_CLAIM, *{**values, **changes}.values())
    assert row is not None
    return row


async def release(sql: Sql, value: bytes, digest: bytes | None = None) -> str:
    """Give a claim back. `digest`: of the call, if its reply was lost."""
    outcome: str = await sql.fetchval("SELECT outcome FROM keyproxy.release_approval($1, $2)", value, digest)
    return outcome


async def decide(sql: Sql, state: str, digest: bytes = DIGEST, *, lasts: str = "5 minutes") -> str:
    """Approve or deny the live approval of a call, and return its id."""
    decided: str = await sql.fetchval(
        "UPDATE keyproxy.approvals SET state = $1, decided_at = now(), decided_by = 'ann',"
        f" expires_at = now() + interval '{lasts}'"
        " WHERE call_digest = $2 AND state IN ('pending', 'approved', 'denied') RETURNING id",
        state, digest,
    )  # fmt: skip
    return decided


async def approve(sql: Sql, digest: bytes = DIGEST, **changes: Any) -> str:
    """Ask for the approval of a call, approve it, and return its id."""
    assert (await claim(sql, digest, **changes))["outcome"] == "pending"
    return await decide(sql, "approved", digest)


async def expire(sql: Sql, approval_id: str) -> None:
    """Let an approval end a moment ago."""
    await sql.execute(
        "UPDATE keyproxy.approvals SET expires_at = clock_timestamp() - interval '1 ms' WHERE id = $1", approval_id
    )


async def states(sql: Sql, digest: bytes = DIGEST) -> list[str]:
    """The states of the approvals of a call, the oldest first."""
    rows = await sql.fetch(
        "SELECT state FROM keyproxy.approvals WHERE call_digest = $1 ORDER BY created_at, id", digest
    )
    return [row["state"] for row in rows]
