"""Reminders of keys and admin tokens that expire soon.

There is one reminder for each key or token, expiry and threshold, with a permanent id. A sender claims it for a limited
time. If the sender dies, another one sends the same id again after that time: a reminder is sent at least once, and the
receiver recognises a duplicate by its id. Claiming skips reminders that are no longer needed: their key is revoked,
replaced by a key that works, expired, or of a disabled user or tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import orjson

from keyproxy.store.outbox.message import (
    ADMIN_TOKEN_EXPIRING,
    CLAIM_LEASE,
    KEY_EXPIRING,
    REASON_CHARACTERS_MAX,
    Abandoned,
    Message,
)
from keyproxy.store.postgres.database import Database, Row, StatementRunner
from keyproxy.store.postgres.times import time_text

_WRITTEN_MAX: Final = 500
#: Longer than any retry, so that a deleted reminder is never written again.
_KEPT: Final = timedelta(days=30)


class ReminderQueue:
    """The queue of reminders. All methods raise StoreUnavailable."""

    def __init__(self, database: StatementRunner, before_days: Callable[[], Sequence[int]] = tuple) -> None:
        """`before_days`: the thresholds of the reminders that `write` writes."""
        self._database = database
        self._before_days = before_days

    @property
    def is_store_down(self) -> bool:
        """Whether the store is known to be down; the outage has been logged."""
        return isinstance(self._database, Database) and self._database.is_down

    async def prepare(self) -> list[Abandoned]:
        """Write the reminders that are due, and abandon those whose subject has expired."""
        await self.write(self._before_days())
        rows = await self._database.fetch("give_up_late_reminders")
        return [Abandoned(_subject(row), f"already expired; {row['last_error'] or ''}", _kind(row)) for row in rows]

    async def write(self, before_days: Sequence[int]) -> int:
        """Write the reminders that are due, and return their number. Several processes may do so at once."""
        written = 0
        while rows := await self._database.fetch("reminders_due", list(before_days), _WRITTEN_MAX):
            written += await self._write("write_reminders", "key_id", rows)
        while rows := await self._database.fetch("token_reminders_due", list(before_days), _WRITTEN_MAX):
            written += await self._write("write_token_reminders", "token_id", rows)
        await self._database.fetch("forget_reminders", _KEPT)
        return written

    async def _write(self, statement: str, subject_column: str, rows: Sequence[Row]) -> int:
        columns = ([row[name] for row in rows] for name in (subject_column, "expires_at", "before_days"))
        return len(await self._database.fetch(statement, *columns))

    async def claim(self, limit: int, lease: timedelta = CLAIM_LEASE) -> list[Message]:
        """Claim at most `limit` reminders to send now. No other sender gets them before the lease ends."""
        rows = await self._database.fetch("claim_reminders", limit, lease)
        return [Message(row["id"], _subject(row), _content(row), row["attempts"], _kind(row)) for row in rows]

    async def sent(self, message: Message) -> None:
        """Mark a reminder as received."""
        await self._database.fetch("reminder_sent", message.id)

    async def failed(self, message: Message, why: str, again_in: timedelta | None) -> None:
        """Record a failed attempt, and retry after `again_in`; None abandons the reminder."""
        reason = why[:REASON_CHARACTERS_MAX]
        await self._database.fetch("reminder_failed", message.id, message.attempts, reason, again_in)

    async def waiting(self, limit: int) -> list[dict[str, Any]]:
        """The reminders that are written and not sent yet."""
        return [_shown(row) for row in await self._database.fetch("reminders_waiting", limit)]

    async def due(self, before_days: Sequence[int], limit: int) -> list[dict[str, Any]]:
        """The reminders that `write` would write now."""
        keys = await self._database.fetch("reminders_due", list(before_days), limit)
        tokens = await self._database.fetch("token_reminders_due", list(before_days), limit)
        return [_shown(row) for row in (*keys, *tokens)]

    async def count_waiting(self) -> int:
        """The number of reminders that are written and not sent yet."""
        waiting: int = (await self._database.fetch("count_reminders_waiting"))[0]["waiting"]
        return waiting

    async def expiring(self, days: Sequence[int]) -> dict[tuple[int, bool], int]:
        """The number of working keys that expire within each number of days, by (days, whether test keys)."""
        rows = await self._database.fetch("count_expiring_keys", list(days))
        return {(row["days"], row["is_test"]): row["keys"] for row in rows}

    async def expiring_tokens(self, days: Sequence[int]) -> dict[int, int]:
        """The number of working admin tokens that expire within each number of days."""
        rows = await self._database.fetch("count_expiring_tokens", list(days))
        return {row["days"]: row["tokens"] for row in rows}

    async def token_expiries(self, limit: int) -> dict[str, float]:
        """The expiry of working admin tokens as Unix time; at most `limit`, the earliest ones."""
        rows = await self._database.fetch("next_tokens_to_expire", limit)
        return {row["id"]: row["expires_at"] for row in rows}


def _kind(row: Row) -> str:
    return KEY_EXPIRING if row["token_id"] is None else ADMIN_TOKEN_EXPIRING


def _subject(row: Row) -> str:
    key, token = row["key_id"], row["token_id"]
    return f"reminder of key {key}" if token is None else f"reminder of admin token {token}"


def _content(row: Row) -> bytes:
    """The webhook's payload: contains no secret, and is the same for each attempt unless the key changes."""
    if row["token_id"] is not None:
        what: dict[str, object] = {"token": row["token_id"], "tenant": row["tenant_id"]}
    else:
        mode = "test" if row["is_test"] else "live"
        what = {"key": row["key_id"], "user": row["user_id"], "tenant": row["tenant_id"], "mode": mode}
    return orjson.dumps(
        {
            "type": _kind(row),
            "timestamp": time_text(row["created_at"]),
            "data": {
                **what,
                "hint": row["hint"],
                "name": row["name"],
                "expires_at": time_text(row["expires_at"]),
                "before_days": row["before_days"],
            },
        }
    )


def _shown(row: Row) -> dict[str, Any]:
    is_written = "id" in row.keys()  # noqa: SIM118 - `in` on a record searches its values, not its keys
    return {
        "id": row["id"] if is_written else None,
        "key": row.get("key_id"),
        "token": row.get("token_id"),
        "user": row.get("user_id"),
        "tenant": row["tenant_id"],
        "hint": row["hint"],
        "name": row["name"],
        "is_test": row.get("is_test"),
        "expires_at": time_text(row["expires_at"]),
        "before_days": row["before_days"],
        "attempts": row["attempts"] if is_written else 0,
        "last_error": row["last_error"] if is_written else None,
    }
