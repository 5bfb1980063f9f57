"""Alerts of limits: one for each window and percentage that its spend reaches.

The ledger writes them, each with a permanent message id, in the transaction in which the percentage is reached. As with
reminders, a sender claims an alert for a limited time, and the same id is sent again if it dies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Final

import orjson

from keyproxy.limits.ledger_protocol import BUDGETS
from keyproxy.limits.plan import TOTAL
from keyproxy.store.outbox.message import CLAIM_LEASE, LIMIT_THRESHOLD, REASON_CHARACTERS_MAX, Abandoned, Message
from keyproxy.store.postgres.database import Database, Row, StatementRunner
from keyproxy.store.postgres.times import time_text

#: An alert that no sender has tried to deliver for this long is abandoned: a webhook that is configured later gets none
#: of the past.
_LATE: Final = timedelta(hours=24)


class LimitAlertQueue:
    """The queue of alerts. All methods raise StoreUnavailable."""

    def __init__(self, database: StatementRunner, percentages: Callable[[], Sequence[int]] = tuple) -> None:
        """`percentages`: those that are configured."""
        self._database = database
        self._configured = percentages
        self._percentages: dict[str, int] = {}
        self._delivered: dict[int, int] = {}

    @property
    def delivered(self) -> dict[str, int]:
        """How many alerts this process has delivered, by percentage; 0 for those that are configured."""
        counts = dict.fromkeys(self._configured(), 0) | self._delivered
        return {str(percentage): count for percentage, count in counts.items()}

    @property
    def is_store_down(self) -> bool:
        """Whether the store is known to be down; the outage has been logged."""
        return isinstance(self._database, Database) and self._database.is_down

    async def prepare(self) -> list[Abandoned]:
        """Abandon alerts that are late. The ledger writes them, and each is kept as long as its window."""
        late: int = (await self._database.fetch("give_up_late_alerts", _LATE))[0]["alerts"]
        return [Abandoned(f"{late} alerts", "not sent within 24 hours", LIMIT_THRESHOLD)] if late else []

    async def claim(self, limit: int, lease: timedelta = CLAIM_LEASE) -> list[Message]:
        """Claim at most `limit` alerts to send now. No other sender gets them before the lease ends."""
        rows = await self._database.fetch("claim_alerts", limit, lease)
        self._percentages = {row["message_id"]: row["percentage"] for row in rows}
        return [
            Message(row["message_id"], _subject(row), _content(row), row["attempts"], LIMIT_THRESHOLD) for row in rows
        ]

    async def sent(self, message: Message) -> None:
        """Mark an alert as received."""
        percentage = self._percentages[message.id]
        self._delivered[percentage] = self._delivered.get(percentage, 0) + 1
        await self._database.fetch("alert_delivered", message.id)

    async def failed(self, message: Message, why: str, again_in: timedelta | None) -> None:
        """Record a failed attempt, and retry after `again_in`; None abandons the alert."""
        reason = why[:REASON_CHARACTERS_MAX]
        await self._database.fetch("alert_failed", message.id, message.attempts, reason, again_in)


def _subject(row: Row) -> str:
    return f"alert of {_limit(row)} of {row['pool_kind']} {row['pool_id']} at {row['percentage']} %"


def _limit(row: Row) -> str:
    measure: str = row["measure"]
    return measure.replace("_per_", "/").replace(f"_{TOTAL}", f"/{TOTAL}")


def _content(row: Row) -> bytes:
    """The payload, the same for each attempt. `amount` and `spent` are those when the percentage was reached.

    A budget counts in a window that neither starts nor ends.
    """
    is_budget = row["measure"] in BUDGETS
    return orjson.dumps(
        {
            "type": LIMIT_THRESHOLD,
            "timestamp": time_text(row["created_at"]),
            "data": {
                "pool_kind": row["pool_kind"],
                "pool_id": row["pool_id"],
                "tenant": row["tenant_id"],
                "mode": "test" if row["is_test"] else "live",
                "limit": _limit(row),
                "selector": row["selector"],
                "percentage": row["percentage"],
                "amount": row["amount"],
                "spent": row["spent"],
                "window_starts": None if is_budget else time_text(row["window_starts"]),
                "window_ends": None if is_budget else time_text(row["window_ends"]),
            },
        }
    )
