"""Which leases to review next: those that requests are short of, those that changed, those that may have become idle.

A review decides whether the next message reports a lease. Nothing here iterates over all leases, so the work grows with
the number of changes, not with the number of users that have requests in flight.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

from keyproxy.limits.lease import Lease

#: Reviews that are scheduled within such a slice of a second share an entry of the heap: an entry of its own takes 130
#: bytes for each lease.
_SLICES_PER_SECOND: Final = 8.0


class ReviewQueue:
    """Leases that wait for a review, each at most once."""

    def __init__(self, wake: Callable[[], None], wake_soon: Callable[[], None] | None = None) -> None:
        """`wake` is called when a lease becomes urgent, `wake_soon` when one runs low; each once until `rearm`."""
        self._wake = wake
        self._wake_soon = wake_soon or wake
        self._is_woken = self._is_woken_soon = False
        #: Leases that a request is short of, or that run low, in order.
        self._urgent: dict[Lease, None] = {}
        #: Leases that changed; `gather` makes them due, in this order.
        self._changed: list[Lease] = []
        self._due: deque[Lease] = deque()
        #: Leases by the slice of time of their review; one whose `review_mono` has changed since does not count. And a
        #: heap of these slices.
        self._scheduled: dict[int, list[Lease]] = {}
        self._slices: list[int] = []

    @property
    def due(self) -> list[Lease]:
        """The leases that are due, in order; the urgent ones come before them."""
        return list(self._due)

    @property
    def due_count(self) -> int:
        """The number of leases that are due."""
        return len(self._due)

    def note_change(self, lease: Lease) -> None:
        """Review a lease after the next `gather`, because it changed. Ends its rest."""
        if lease.is_resting or not lease.is_noted:
            lease.is_resting = False
            lease.is_noted = True
            self._changed.append(lease)

    def make_urgent(self, lease: Lease) -> None:
        """Review a lease with the next message."""
        self._urgent[lease] = None
        if not self._is_woken:
            self._is_woken = True
            self._wake()

    def note_low(self, lease: Lease) -> None:
        """Review a lease that runs low with the next message. It may wait a little, so that others join the message."""
        self._urgent[lease] = None
        if not (self._is_woken or self._is_woken_soon):
            self._is_woken_soon = True
            self._wake_soon()

    def make_due(self, lease: Lease) -> None:
        """Review a lease without waiting for `gather`, after the urgent ones."""
        if lease.is_resting or not lease.is_noted:
            lease.is_resting = False
            lease.is_noted = True
            self._due.append(lease)

    def rest(self, lease: Lease, until_mono: float) -> None:
        """Review a lease at a time, and not because requests change it before: it counts as noted until then."""
        self.review_at(lease, until_mono)
        if not lease.is_noted:
            lease.is_noted = lease.is_resting = True

    def review_when_idle(self, lease: Lease, now_mono: float) -> None:
        """Review a lease in use when it has been idle for a while."""
        if lease.is_busy(now_mono):
            self.review_at(lease, lease.idle_mono)

    def review_at(self, lease: Lease, when_mono: float) -> None:
        """Review a lease at a time, unless a review is scheduled for an earlier one."""
        if when_mono < lease.review_mono:
            lease.review_mono = when_mono
            self._schedule(lease, _slice_of(when_mono))

    def _schedule(self, lease: Lease, at: int) -> None:
        leases = self._scheduled.get(at)
        if leases is None:
            self._scheduled[at] = [lease]
            heappush(self._slices, at)
        else:
            leases.append(lease)

    def gather(self, now_mono: float) -> None:
        """Make all leases due that changed or whose review is scheduled for now."""
        self._due.extend(self._changed)
        self._changed.clear()
        latest = _slice_of(now_mono)
        while self._slices and self._slices[0] <= latest:
            at = heappop(self._slices)
            later = []
            for lease in self._scheduled.pop(at):
                if lease.review_mono <= now_mono:
                    lease.review_mono = math.inf
                    self.make_due(lease)
                elif lease.review_mono < math.inf and _slice_of(lease.review_mono) == at:
                    later.append(lease)
            if later:
                # The rest of the current slice.
                self._scheduled[at] = later
                heappush(self._slices, at)
                return

    def rearm(self) -> None:
        """Call `wake` again for the next urgent lease, and `wake_soon` for the next one that runs low."""
        self._is_woken = self._is_woken_soon = False

    def is_urgent(self, lease: Lease) -> bool:
        """Whether a lease is urgent and was not reviewed yet."""
        return lease in self._urgent

    def next_urgent(self) -> Lease | None:
        """Remove and return the next urgent lease."""
        if not self._urgent:
            return None
        lease = next(iter(self._urgent))
        del self._urgent[lease]
        return lease

    def next_due(self) -> Lease | None:
        """Remove and return the next due lease."""
        if not self._due:
            return None
        lease = self._due.popleft()
        lease.is_noted = False
        return lease

    def not_urgent(self, lease: Lease) -> None:
        """Do not review a lease as urgent: it was reported otherwise."""
        self._urgent.pop(lease, None)

    def clear_urgent(self) -> None:
        """No lease is urgent any more."""
        self._urgent.clear()


def _slice_of(when_mono: float) -> int:
    return math.floor(when_mono * _SLICES_PER_SECOND)
