"""Events for webhooks: of approvals, and of unusual use of keys.

Triggers and functions of the database write them, each with a permanent id, in the transaction of what they report. As
with reminders, a sender claims an event for a limited time, and the same id is sent again if it dies. An event that
expires before it is delivered is abandoned. A notification on CHANNEL follows each new event.
"""

from __future__ import annotations

import collections
from datetime import timedelta
from typing import Final

import orjson

from keyproxy.store.outbox.message import CLAIM_LEASE, REASON_CHARACTERS_MAX, Abandoned, Message
from keyproxy.store.postgres.database import Database, Row, StatementRunner
from keyproxy.store.postgres.json_values import read_json
from keyproxy.store.postgres.times import time_text

CHANNEL: Final = "keyproxy_events"

#: What the kinds of events start with.
APPROVAL_EVENTS: Final = "approval."
KEY_EVENTS: Final = "key."


class EventQueue:
    """The queue of events whose kinds start with a prefix. All methods raise StoreUnavailable."""

    def __init__(self, database: StatementRunner, kinds: str) -> None:
        """`kinds`: APPROVAL_EVENTS or KEY_EVENTS."""
        self._database = database
        self._kinds = kinds

    @property
    def is_store_down(self) -> bool:
        """Whether the store is known to be down; the outage has been logged."""
        return isinstance(self._database, Database) and self._database.is_down

    async def prepare(self) -> list[Abandoned]:
        """Abandon events that have expired."""
        rows = await self._database.fetch("give_up_late_events", self._kinds)
        tried = [row for row in rows if row["attempts"]]
        untried = collections.Counter(row["kind"] for row in rows if not row["attempts"])
        return [
            *(Abandoned(_subject(row), f"expired; {row['last_error'] or ''}", row["kind"]) for row in tried),
            *(
                Abandoned(f"{many} events ({kind})", "expired before an attempt", kind)
                for kind, many in untried.items()
            ),
        ]

    async def claim(self, limit: int, lease: timedelta = CLAIM_LEASE) -> list[Message]:
        """Claim at most `limit` events to send now. No other sender gets them before the lease ends."""
        rows = await self._database.fetch("claim_events", limit, lease, self._kinds)
        return [Message(row["id"], _subject(row), _content(row), row["attempts"], row["kind"]) for row in rows]

    async def sent(self, message: Message) -> None:
        """Mark an event as received."""
        await self._database.fetch("event_sent", message.id)

    async def failed(self, message: Message, why: str, again_in: timedelta | None) -> None:
        """Record a failed attempt, and retry after `again_in`; None abandons the event."""
        reason = why[:REASON_CHARACTERS_MAX]
        await self._database.fetch("event_failed", message.id, message.attempts, reason, again_in)

    async def count_waiting(self) -> int:
        """The number of events that are not sent yet."""
        waiting: int = (await self._database.fetch("count_events_waiting", self._kinds))[0]["waiting"]
        return waiting


def _subject(row: Row) -> str:
    return f"event {row['id']} ({row['kind']})"


def _content(row: Row) -> bytes:
    """The payload, the same for each attempt."""
    return orjson.dumps(
        {"type": row["kind"], "timestamp": time_text(row["created_at"]), "data": read_json(row["payload"])}
    )
