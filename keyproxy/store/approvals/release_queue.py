"""Gives claimed approvals back, of which nothing was sent upstream: until the store has done so, or they have expired.

A claim whose reply was lost is given back too. It may have succeeded, have failed, or be on its way still; giving it back
leaves its value in the store, so that it fails if it arrives later. The approval stays used until the store responds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Final, NamedTuple

from keyproxy.model import Moment
from keyproxy.store.background import BackgroundTask
from keyproxy.store.postgres.database import StatementRunner, StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

#: How many claims may wait. Beyond this, an approval stays used, and the call needs another one.
_WAITING_MAX: Final = 10_000

#: A transaction that keeps the row locked, and a later approval of the same call that is not used yet.
_NOT_YET: Final = ("busy", "waiting")

_RETRY_SECONDS: Final = (0.1, 0.2, 0.4, 0.8, 1.5)
_CLOSE_SECONDS: Final = 3.0


class _Release(NamedTuple):
    """`digest`: of the call, if the reply to the claim was lost, else None. `name`: the approval or the tool."""

    claim: bytes
    digest: bytes | None
    name: str
    until_mono: float


class ReleaseQueue:
    """The claims that are to be given back: see the module."""

    def __init__(self, database: StatementRunner, now: Callable[[], Moment]) -> None:
        self.lasting = BackgroundTask("approvals")
        #: How many approvals were given back, and how many could not be before they expired.
        self.released = self.lost = 0
        self._database = database
        self._now = now
        self._waiting: dict[bytes, _Release] = {}
        self._successor: ReleaseQueue | None = None
        self._is_closed = False
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        """How many claims wait."""
        return len(self._waiting)

    def add(self, claim: bytes, name: str, *, within_seconds: float, digest: bytes | None = None) -> None:
        """Give a claim back. Never waits. `within_seconds`: when the approval has expired for certain.

        `digest`: the digest of the call, if the reply to its claim was lost.
        """
        if self._is_closed and self._successor is not None:
            self._successor.add(claim, name, within_seconds=within_seconds, digest=digest)
            return
        if len(self._waiting) >= _WAITING_MAX:
            self.lost += 1
            _log.error("%s stays used: %d claims are waiting to be given back", name, _WAITING_MAX)
            return
        self._waiting[claim] = _Release(claim, digest, name, self._now().mono_seconds + within_seconds)
        self._wake.set()

    def continue_from(self, before: ReleaseQueue) -> None:
        """Take over the counts of another queue, and the claims that are added to it once it is closed."""
        self.released, self.lost = before.released, before.lost
        before._successor = self

    def start(self) -> None:
        """Start giving back."""
        self.lasting.start(self._follow)

    async def close(self) -> None:
        """Give back what is waiting, in a bounded time."""
        await self.lasting.end()
        self._is_closed = True
        with contextlib.suppress(TimeoutError, StoreUnavailable, StoreConflict):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self.flush()
        for one in self._waiting.values():
            _log.error("%s stays used: its claim was not given back before the end of this process", one.name)

    async def flush(self) -> bool:
        """Give back what is waiting, once. Whether none is left. Raises StoreUnavailable or StoreConflict."""
        for one in list(self._waiting.values()):
            if self._now().mono_seconds >= one.until_mono:
                self._drop(one)
                continue
            (row,) = await self._database.fetch("release_approval", one.claim, one.digest)
            if row["outcome"] in _NOT_YET:
                continue
            self.released += row["outcome"] == "released"
            self._waiting.pop(one.claim, None)
        return not self._waiting

    def _drop(self, one: _Release) -> None:
        self._waiting.pop(one.claim, None)
        if one.digest is None:
            self.lost += 1
            _log.warning("%s has expired before it could be given back", one.name)

    async def _follow(self) -> None:
        failures = 0
        while True:
            await self._wake.wait()
            # Cleared before flushing, so that a claim that is added meanwhile causes another round.
            self._wake.clear()
            try:
                is_done = await self.flush()
            except (StoreUnavailable, StoreConflict) as error:
                _log.debug("giving approvals back failed, retrying: %s", error)
                is_done = False
            if is_done:
                failures = 0
                continue
            self._wake.set()
            pause = _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)]
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - spreads retries
            failures += 1
