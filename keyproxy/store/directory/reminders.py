"""Reminders of keys and admin tokens that expire soon: written before they are sent, claimed by one sender, marked once
received.

One reminder for each key or token, expiry and threshold, with one id for as long as it lives. A sender claims it for a
while. If it dies on its way, another one sends the same id again when that has passed: a reminder is sent at least once,
and the receiver recognises a duplicate by its id. Claiming skips reminders that are no longer needed: their key is
revoked, replaced by a key that works, expired, or of a disabled user or tenant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from keyproxy.store.postgres.database import Database, Door, Row
from keyproxy.store.postgres.times import Instant, time_text

_WRITTEN_MAX: Final = 500
_REASON_CHARACTERS_MAX: Final = 500
#: Longer than anybody tries again, so that what is forgotten is never written anew.
_KEPT: Final = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Reminder:
    """One that was claimed: to be sent now, for the `attempts`-th time. `created_at`: when it became due.

    It is of a key, which belongs to a `user`, or of a token of the admin API, which may be bound to a tenant.
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


class Reminders:
    """See the module. All methods raise StoreUnavailable."""

    def __init__(self, database: Door) -> None:
        self._database = database

    @property
    def is_store_down(self) -> bool:
        """Whether the store is known to be down, which has been logged then."""
        return isinstance(self._database, Database) and self._database.is_down

    async def write(self, before_days: Sequence[int]) -> int:
        """Write what is due and not written yet; how many there were. Several may do so at once."""
        written = 0
        while rows := await self._database.fetch("reminders_due", list(before_days), _WRITTEN_MAX):
            made = await self._database.fetch(
                "write_reminders", [row["key_id"] for row in rows], [row["expires_at"] for row in rows],
                [row["before_days"] for row in rows],
            )  # fmt: skip
            written += len(made)
        while rows := await self._database.fetch("token_reminders_due", list(before_days), _WRITTEN_MAX):
            made = await self._database.fetch(
                "write_token_reminders", [row["token_id"] for row in rows], [row["expires_at"] for row in rows],
                [row["before_days"] for row in rows],
            )  # fmt: skip
            written += len(made)
        await self._database.fetch("forget_reminders", _KEPT)
        return written

    async def claim(self, limit: int, lease: timedelta) -> list[Reminder]:
        """What is to be sent now, at most `limit`. Nobody else gets these before the lease ends."""
        rows = await self._database.fetch("claim_reminders", limit, lease)
        return [_reminder(row) for row in rows]

    async def sent(self, reminder: Reminder) -> None:
        """It was received."""
        await self._database.fetch("reminder_sent", reminder.id)

    async def failed(self, reminder: Reminder, why: str, again_in: timedelta | None) -> None:
        """It was not received, as far as is known; None: it is given up."""
        await self._database.fetch(
            "reminder_failed", reminder.id, reminder.attempts, why[:_REASON_CHARACTERS_MAX], again_in
        )

    async def given_up_late(self) -> list[tuple[str, str, str]]:
        """(id, key or token, why the last attempt failed) of those that have expired meanwhile; they are given up."""
        rows = await self._database.fetch("give_up_late_reminders")
        return [(row["id"], subject(row["key_id"], row["token_id"]), row["last_error"] or "") for row in rows]

    async def waiting(self, limit: int) -> list[dict[str, Any]]:
        """What is written and still to be sent."""
        return [_told(row) for row in await self._database.fetch("reminders_waiting", limit)]

    async def due(self, before_days: Sequence[int], limit: int) -> list[dict[str, Any]]:
        """What would be written now."""
        keys = await self._database.fetch("reminders_due", list(before_days), limit)
        tokens = await self._database.fetch("token_reminders_due", list(before_days), limit)
        return [_told(row) for row in (*keys, *tokens)]

    async def count_waiting(self) -> int:
        """How many are written and still to be sent."""
        waiting: int = (await self._database.fetch("count_reminders_waiting"))[0]["waiting"]
        return waiting

    async def expiring(self, days: Sequence[int]) -> dict[tuple[int, bool], int]:
        """How many working keys end within so many days, by (days, whether they are test keys)."""
        rows = await self._database.fetch("count_expiring_keys", list(days))
        return {(row["days"], row["is_test"]): row["keys"] for row in rows}

    async def expiring_tokens(self, days: Sequence[int]) -> dict[int, int]:
        """How many working tokens of the admin API end within so many days."""
        rows = await self._database.fetch("count_expiring_tokens", list(days))
        return {row["days"]: row["tokens"] for row in rows}

    async def token_expiries(self, limit: int) -> dict[str, float]:
        """When the working tokens of the admin API end, in Unix time; those that end soonest."""
        rows = await self._database.fetch("next_tokens_to_expire", limit)
        return {row["id"]: row["expires_at"] for row in rows}


def subject(key_id: str | None, token_id: str | None) -> str:
    """The subject of a reminder, for a log line."""
    return f"key {key_id}" if token_id is None else f"admin token {token_id}"


def _reminder(row: Row) -> Reminder:
    return Reminder(
        row["id"], row["key_id"], row["token_id"], row["user_id"], row["tenant_id"], row["hint"], row["name"],
        row["is_test"], row["expires_at"], row["before_days"], row["created_at"], row["attempts"],
    )  # fmt: skip


def _told(row: Row) -> dict[str, Any]:
    is_written = "id" in row.keys()  # noqa: SIM118 - a record's keys are not what it contains
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
