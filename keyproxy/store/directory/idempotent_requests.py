"""Idempotent requests: a request that is repeated with the same Idempotency-Key gets the same response.

The response is stored in the transaction of the request's changes, so a crash leaves both or neither. A refused request
changes nothing and is not stored: repeated, it is processed again.

The client's key and the request itself are stored as SHA-256 only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from keyproxy.store.postgres.database import Database, JoinedTransaction, StatementRunner

KEPT: Final = timedelta(hours=24)

StoredResponse = dict[str, Any]


class InProgress(Exception):
    """The same request is being processed at the moment."""


class KeyReused(Exception):
    """The key was used with a different request before."""


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """One request: the id of its token, its Idempotency-Key, and its content as unambiguous bytes."""

    token_id: str
    key: str
    request: bytes

    @property
    def key_digest(self) -> bytes:
        """SHA-256 of the token's id and the key."""
        return hashlib.sha256(f"{self.token_id}\n{self.key}".encode()).digest()

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the content."""
        return hashlib.sha256(self.request).digest()


async def respond_once(
    database: Database,
    record: IdempotencyRecord,
    work: Callable[[StatementRunner], Awaitable[StoredResponse]],
    *,
    without: Callable[[StoredResponse], StoredResponse],
) -> tuple[StoredResponse, bool]:
    """Return the response, and whether it was stored by an earlier request.

    `work` must run all its statements through its argument. `without` removes secrets, which must not be stored, from a
    response. Raises InProgress, KeyReused, and what `work` raises: then the transaction is rolled back.
    """
    async with database.transaction() as transaction:
        joined = JoinedTransaction(transaction)
        lock = int.from_bytes(record.key_digest[:8], "big", signed=True)
        claimed = await joined.fetch("claim_request", lock)
        if not claimed[0]["is_claimed"]:
            raise InProgress
        # An earlier holder of the lock has committed or rolled back.
        found = await joined.fetch("answered_request", record.token_id, record.key_digest)
        if found:
            if found[0]["fingerprint"] != record.fingerprint:
                raise KeyReused
            stored: StoredResponse = json.loads(found[0]["answer"])
            return stored, True
        response = await work(joined)
        text = json.dumps(without(response))
        await joined.fetch("keep_answer", record.token_id, record.key_digest, record.fingerprint, text)
        await joined.fetch("forget_answers", KEPT)
        return response, False
