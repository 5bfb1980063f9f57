"""Reminders of keys and admin tokens that expire soon: written before they are sent, claimed by one sender, marked once
received.

There is one reminder for each key or token, expiry and threshold, with a permanent id. A sender claims it for a limited
time. If the sender dies, another one sends the same id again after that time: a reminder is sent at least once, and the
receiver recognises a duplicate by its id. Claiming skips reminders that are no longer needed: their key is revoked,
replaced by a key that works, expired, or of a disabled user or tenant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from keyproxy.store.postgres.database import Database, Row, StatementRunner
from keyproxy.store.postgres.times import Instant, time_text

_WRITTEN_MAX: Final = 500
_REASON_CHARACTERS_MAX: Final = 500
#: Longer than any retry, so that a deleted reminder is never written again.
_KEPT: Final = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Reminder:
    """A claimed reminder, to be sent now as attempt number `attempts`. `created_at`: when it became due.

    Its subject is a key, which belongs to a `user`, or a token of the admin API, which may be bound to a tenant.
    """

    id: str
    key: str | None
    token: str | None
    user: str | None
    tenant: str | None
    hint: str
    name: str
    is_test: bool | None
    expires_at: Instant
    before_days: int
    created_at: Instant
    attempts: int


class ReminderQueue:
    """The queue of reminders. All methods raise StoreUnavailable."""

    def __init__(self, database: StatementRunner) -> None:
        self._database = database

    @property
    def is_store_down(self) -> bool:
        """Whether the store is known to be down; the outage has been logged."""
        return isinstance(self._database, Database) and self._database.is_down

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

    async def claim(self, limit: int, lease: timedelta) -> list[Reminder]:
        """Claim at most `limit` reminders to send now. No other sender gets them before the lease ends."""
        rows = await self._database.fetch("claim_reminders", limit, lease)
        return [_reminder(row) for row in rows]

    async def sent(self, reminder: Reminder) -> None:
        """Mark a reminder as received."""
        await self._database.fetch("reminder_sent", reminder.id)

    async def failed(self, reminder: Reminder, why: str, again_in: timedelta | None) -> None:
        """Record a failed attempt, and retry after `again_in`; None gives up."""
        await self._database.fetch(
            "reminder_failed", reminder.id, reminder.attempts, why[:_REASON_CHARACTERS_MAX], again_in
        )

    async def given_up_late(self) -> list[tuple[str, str, str]]:
        """Give up reminders whose subject has expired. Return (id, key or token, last error) of each."""
        rows = await self._database.fetch("give_up_late_reminders")
        return [(row["id"], subject(row["key_id"], row["token_id"]), row["last_error"] or "") for row in rows]

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


def subject(key_id: str | None, token_id: str | None) -> str:
    """The subject of a reminder, for a log line."""
    return f"key {key_id}" if token_id is None else f"admin token {token_id}"


def _reminder(row: Row) -> Reminder:
    return Reminder(
        id=row["id"],
        key=row["key_id"],
        token=row["token_id"],
        user=row["user_id"],
        tenant=row["tenant_id"],
        hint=row["hint"],
        name=row["name"],
        is_test=row["is_test"],
        expires_at=row["expires_at"],
        before_days=row["before_days"],
        created_at=row["created_at"],
        attempts=row["attempts"],
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
