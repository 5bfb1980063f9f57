"""The lookup of one subject for one request, which either waits for it in a task or is called back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from keyproxy.model import Missing, TimeBudget
from keyproxy.reasons import Refusal
from keyproxy.store.identities.lookup_batcher import Flight, LookupBatcher


class LookupOwner:
    """What the lookups of one cache have in common.

    `count`: counts a miss, and returns whether there is an outdated entry. `restore`: caches the result of a lookup
    again, if a full cache has evicted it before the request that needs it has run.
    """

    __slots__ = ("batcher", "count", "restore")

    def __init__(
        self, batcher: LookupBatcher[Any], count: Callable[[Any], bool], restore: Callable[[Any, Flight], None]
    ) -> None:
        self.batcher = batcher
        self.count = count
        self.restore = restore

    def missing(self, subject: object) -> Missing:
        """A Missing that looks the subject up."""
        look_up = _RequestLookup(self, subject)
        return Missing("identity", look_up.fetch, look_up.begin)


class _RequestLookup:
    __slots__ = ("_done", "_owner", "_subject")

    def __init__(self, owner: LookupOwner, subject: object) -> None:
        self._owner = owner
        self._subject = subject
        self._done: Callable[[Refusal | None], None] | None = None

    async def fetch(self, _patience: TimeBudget) -> None:
        """Wait for the result. Raises a Refusal if there is none."""
        owner, subject = self._owner, self._subject
        flight = owner.batcher.enqueue(subject, is_known=owner.count(subject))
        if flight is None:
            raise owner.batcher.too_many(subject)
        # A cancelled request must not cancel the lookup for the others.
        refusal: Refusal | None = await asyncio.shield(flight.result)
        if refusal is not None:
            raise Refusal(refusal.reason, refusal.detail)
        owner.restore(subject, flight)

    def begin(self, done: Callable[[Refusal | None], None]) -> None:
        """Call `done` in a later iteration of the event loop, with the refusal if there is no result."""
        owner, subject = self._owner, self._subject
        flight = owner.batcher.enqueue(subject, is_known=owner.count(subject))
        if flight is None:
            asyncio.get_running_loop().call_soon(done, owner.batcher.too_many(subject))
        else:
            self._done = done
            flight.call_at_end(self._ended)

    def _ended(self, flight: Flight, refusal: Refusal | None) -> None:
        done, self._done = self._done, None
        try:
            if refusal is None:
                self._owner.restore(self._subject, flight)
            else:
                # Each request has a refusal of its own: raising one changes it.
                refusal = Refusal(refusal.reason, refusal.detail)
        finally:
            if done is not None:
                done(refusal)
