"""The ledger's rules in plain Python, as short as they can be said: what every backend is compared with.

Also the fake of the port LedgerBackend, for tests and simulations that need no server. Its clock is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from keyproxy.limits.leases import CONCURRENCY, Line, Reply, Window

_WANTED_SECONDS = 2.0


@dataclass
class Row:
    """One window as the ledger accounts it."""

    spent: int = 0
    held: int = 0
    forfeited: int = 0
    theoretical: float = -math.inf
    wanted_at: float = -math.inf
    wanted_by: str = ""
    limit: int = 0


@dataclass
class Holder:
    """One process that holds leases."""

    serial: int
    expires_at: float
    has_ended: bool = False
    leases: dict[int, tuple[tuple[Window, int], list[int]]] = field(default_factory=dict)


class ReferenceLedger:
    """See the module."""

    def __init__(self, clock: Callable[[], float], *, lease_seconds: float) -> None:
        """`clock` gives Unix time."""
        self._clock = clock
        self._lease_seconds = lease_seconds
        self.rows: dict[tuple[Window, int], Row] = {}
        self.holders: dict[str, Holder] = {}

    def sync(self, holder: str, serial: int, lines: Sequence[Line]) -> list[Reply] | None:
        """See the port. None: this holder has ended. A message older than one that was heard counts as lost."""
        now = self._clock()
        known = self.holders.setdefault(holder, Holder(0, 0.0))
        if known.has_ended:
            return None
        if serial <= known.serial:
            raise TimeoutError("too late")
        known.serial, known.expires_at = serial, now + self._lease_seconds
        alive = sum(1 for other in self.holders.values() if not other.has_ended and other.expires_at > now)
        return [self._line(holder, known, line, now, alive) for line in lines]

    def reap(self) -> None:
        """End the holders whose time is over."""
        now = self._clock()
        for name, holder in self.holders.items():
            if not holder.has_ended and holder.expires_at <= now:
                self.end(name)

    def end(self, name: str) -> None:
        """End a holder: what it has not returned is charged. Slots are free again."""
        holder = self.holders.get(name)
        if holder is None or holder.has_ended:
            return
        holder.has_ended = True
        for key, (granted, used, returned) in holder.leases.values():
            outstanding = granted - used - returned
            row = self.rows[key]
            row.held -= outstanding
            if key[0].measure != CONCURRENCY:
                row.spent += outstanding
                row.forfeited += outstanding
        holder.leases.clear()

    def _line(self, name: str, holder: Holder, line: Line, now: float, alive: int) -> Reply:
        starts, ends = span(line.window.measure, line.starts or now)
        row = self.rows.setdefault((line.window, starts), Row())
        row.limit = line.limit
        if line.interval_seconds:
            return self._rate(row, line, now, alive)
        is_wanted = now - row.wanted_at < _WANTED_SECONDS and row.wanted_by != name
        before = holder.leases.get(line.lease)
        if before is None and line.is_closing:
            return Reply(line.lease, starts, line.granted, row.spent, row.held, ends - now, 0.0, is_wanted)
        granted, used, returned = before[1] if before else (0, 0, 0)
        # What the ledger has forgotten, it hears again from who holds it.
        row.held += max(0, line.granted - granted)
        granted = max(granted, line.granted)
        more_used, more_returned = max(0, line.used - used), max(0, line.returned - returned)
        used, returned = used + more_used, returned + more_returned
        row.spent += more_used
        row.held -= more_used + more_returned
        over = max(0, used + returned - granted)
        granted += over
        row.held += over
        grant = 0
        if now < ends:
            grant = _grant(line, line.limit - row.spent - row.held, alive)
        granted += grant
        row.held += grant
        if line.is_closing:
            # Also what was granted in an answer that got lost.
            row.held -= granted - used - returned
            holder.leases.pop(line.lease, None)
        else:
            holder.leases[line.lease] = ((line.window, starts), [granted, used, returned])
        if line.want and not grant and row.held > granted - used - returned:
            row.wanted_at, row.wanted_by = now, name
        return Reply(line.lease, starts, granted, row.spent, row.held, ends - now, 0.0, is_wanted)

    def _rate(self, row: Row, line: Line, now: float, alive: int) -> Reply:
        """GCRA: the theoretical arrival time is ahead of now by what was taken and has not come back."""
        interval, tolerance = line.interval_seconds, line.limit * line.interval_seconds
        ahead = max(row.theoretical - line.returned * interval, now) - now
        available = math.floor((tolerance - ahead) / interval + 1e-6)
        grant = _grant(line, available, alive)
        ahead += grant * interval
        row.theoretical = now + ahead
        wait = max(0.0, ahead + line.at_least * interval - tolerance) if line.want and not grant else 0.0
        held = line.limit - max(0, available - grant)
        return Reply(line.lease, 0, grant, 0, held, math.inf, wait, False)


def _grant(line: Line, available: int, alive: int) -> int:
    if not line.want or available < line.at_least:
        return 0
    if line.takes_all:
        return available
    # Whoever asks leaves something for the others, the less there is the less they take.
    share = line.want if alive <= 1 else max(line.at_least, available // (2 * alive))
    return min(line.want, available, share)


def span(measure: str, at: float) -> tuple[int, float]:
    """The calendar window that an instant is in: when it starts and when it ends, Unix time."""
    day = datetime.fromtimestamp(at, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if measure.endswith("_per_day"):
        return int(day.timestamp()), (day + timedelta(days=1)).timestamp()
    if measure.endswith("_per_month"):
        first = day.replace(day=1)
        return int(first.timestamp()), (first + timedelta(days=32)).replace(day=1).timestamp()
    return 0, math.inf
