"""Requests that are answered once: whoever sends one again, with the same Idempotency-Key, gets the same answer.

The answer is written in the transaction of what the request changes: there is no moment at which the change counts and
the answer is not known, and a crash leaves both or neither. A request that is refused changes nothing and is not kept:
sent again, it is judged again.

The key that a client chose and the request itself are kept as SHA-256 only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from keyproxy.store.postgres.database import Database, Door, Joined

KEPT: Final = timedelta(hours=24)

Kept = dict[str, Any]


class InProgress(Exception):
    """The same request is being dealt with right now."""


class KeyReused(Exception):
    """The key came with another request before."""


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """One request: whose it is, the key it came with, and what it asks for, as bytes that no other request has."""

    token_id: str
    key: str
    request: bytes

    @property
    def key_digest(self) -> bytes:
        """SHA-256 of the key and whose it is."""
        return hashlib.sha256(f"{self.token_id}\n{self.key}".encode()).digest()

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of what is asked for."""
        return hashlib.sha256(self.request).digest()


async def answer_once(
    database: Database,
    asked: IdempotencyRecord,
    work: Callable[[Door], Awaitable[Kept]],
    *,
    without: Callable[[Kept], Kept],
) -> tuple[Kept, bool]:
    """(the answer, whether it is one that was given before).

    `work` does everything through the door it is given. `without` takes out of an answer what may not be kept. Raises
    InProgress, KeyReused, and what `work` raises: then nothing of it counts.
    """
    async with database.transaction() as transaction:
        door = Joined(transaction)
        lock = int.from_bytes(asked.key_digest[:8], "big", signed=True)
        claimed = await door.fetch("claim_request", lock)
        if not claimed[0]["is_claimed"]:
            raise InProgress
        # Whoever held the claim before has committed, or has left nothing.
        found = await door.fetch("answered_request", asked.token_id, asked.key_digest)
        if found:
            if found[0]["fingerprint"] != asked.fingerprint:
                raise KeyReused
            kept: Kept = json.loads(found[0]["answer"])
            return kept, True
        answer = await work(door)
        await door.fetch(
            "keep_answer", asked.token_id, asked.key_digest, asked.fingerprint, json.dumps(without(answer))
        )  # fmt: skip
        await door.fetch("forget_answers", KEPT)
        return answer, False
