"""The ledger's rules in plain Python, as short as possible: the reference for every backend.

Also the fake of the port LedgerBackend, for tests and simulations that need no server. Its clock is an argument.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from keyproxy.limits.ledger_protocol import CONCURRENCY, LeaseGrant, LeaseReport, Window

_WANTED_SECONDS = 2.0

#: The time for which a ledger that lost history accepts leases claimed by resting or unknown holders.
_CLAIMED_SECONDS = 86_400.0


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
class Account:
    """One lease, with cumulative figures. Units held: granted - used - returned."""

    key: tuple[Window, int]
    granted: int = 0
    used: int = 0
    returned: int = 0

    @property
    def outstanding(self) -> int:
        """The units held by the lease."""
        return self.granted - self.used - self.returned


@dataclass
class Holder:
    """A process that holds leases. It `rests` after expiring without units, until its next message."""

    serial: int
    expires_at: float
    has_ended: bool = False
    rests: bool = False
    leases: dict[int, Account] = field(default_factory=dict)


class ReferenceLedger:
    """See the module."""

    def __init__(self, clock: Callable[[], float], *, lease_seconds: float) -> None:
        """`clock` gives Unix time."""
        self._clock = clock
        self._lease_seconds = lease_seconds
        self.rows: dict[tuple[Window, int], Row] = {}
        self.holders: dict[str, Holder] = {}
        self.settles_until = self.lost_at = -math.inf

    def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> list[LeaseGrant] | None:
        """See the port. None: this holder has ended. A message older than the latest one counts as lost."""
        now = self._clock()
        known = self.holders.get(holder)
        if known is None or known.rests:
            # Its grants no longer exist: they were charged when the holder ended, or are part of lost history.
            claims = any(line.granted and not line.interval_seconds and not line.is_closing for line in lines)
            if claims and now >= self.lost_at + _CLAIMED_SECONDS:
                return None
        known = self.holders.setdefault(holder, Holder(0, 0.0))
        if known.has_ended:
            return None
        if serial <= known.serial:
            raise TimeoutError("too late")
        known.serial, known.expires_at, known.rests = serial, now + self._lease_seconds, False
        message = _Message(self, holder, now)
        for line in lines:
            message.settle(line)
        grants = {line.lease: message.grant(line) for line in message.askers(lines)}
        replies = [message.reply(line, grants.get(line.lease, 0)) for line in lines]
        settles_seconds = self.settles_until - now
        return [LeaseGrant(0, 0, 0, 0, 0, 0.0, settles_seconds, False), *replies] if settles_seconds > 0 else replies

    def reap(self) -> None:
        """End the expired holders."""
        now = self._clock()
        if now < self.settles_until:
            # A holder that seems expired may have sent messages that are part of the lost history.
            return
        for name, holder in self.holders.items():
            if not (holder.has_ended or holder.rests) and holder.expires_at <= now:
                if holder.leases:
                    self.end(name)
                else:
                    holder.rests = True

    def forget(self, after_seconds: float) -> None:
        """Delete resting and ended holders, this long after their expiry."""
        before = self._clock() - after_seconds
        for name, holder in list(self.holders.items()):
            if (holder.rests or holder.has_ended) and holder.expires_at < before:
                del self.holders[name]

    def end(self, name: str) -> None:
        """End a holder: charge the units that it has not returned, and free its slots."""
        holder = self.holders.get(name)
        if holder is None or holder.has_ended:
            return
        holder.has_ended = True
        for account in holder.leases.values():
            row = self.rows[account.key]
            row.held -= account.outstanding
            if account.key[0].measure != CONCURRENCY:
                row.spent += account.outstanding
                row.forfeited += account.outstanding
        holder.leases.clear()

    # -- losing history

    @property
    def has_lost_history(self) -> bool:
        """Whether a replica has ever taken over."""
        return self.lost_at > -math.inf

    def copy(self) -> tuple[dict[tuple[Window, int], Row], dict[str, Holder]]:
        """The state that a replica has received."""
        return copy.deepcopy((self.rows, self.holders))

    def fail_over(self, replica: tuple[dict[tuple[Window, int], Row], dict[str, Holder]]) -> None:
        """Fail over to a replica with incomplete history: nothing is granted for the duration of a lease."""
        self.rows, self.holders = copy.deepcopy(replica)
        self.lost_at = self._clock()
        self.settles_until = self.lost_at + self._lease_seconds


class _Message:
    """Handle one message: settle all lines, then grant free units, then respond."""

    def __init__(self, ledger: ReferenceLedger, name: str, now: float) -> None:
        self._rows, self._name, self._now = ledger.rows, name, now
        self._leases = ledger.holders[name].leases
        self._settles = now < ledger.settles_until
        self._alive = sum(
            1 for other in ledger.holders.values() if not (other.has_ended or other.rests) and other.expires_at > now
        )
        self._is_wanted: dict[int, bool] = {}
        self._told: set[int] = set()
        self._keys: dict[int, tuple[Window, int]] = {}
        #: Of a rate's lines: how far ahead it is, and how much there is of it. And where this message leaves it.
        self._rates: dict[int, tuple[float, int]] = {}
        self._moved: dict[tuple[Window, int], float] = {}

    def settle(self, line: LeaseReport) -> None:
        """Settle a lease."""
        key = self._keys[line.lease] = self._key(line)
        row = self._rows.setdefault(key, Row())
        row.limit = line.limit
        self._is_wanted[line.lease] = self._now - row.wanted_at < _WANTED_SECONDS and row.wanted_by != self._name
        is_known = line.lease in self._leases
        if line.interval_seconds:
            self._rates[line.lease] = self._rate(row, line)
            return
        # A closed lease stays closed.
        if line.is_closing and not is_known:
            return
        account = self._leases.setdefault(line.lease, Account(key))
        self._told.add(line.lease)
        row.held -= account.outstanding
        row.spent += max(0, line.used - account.used)
        # The holder reports leases that the ledger has lost. Use beyond the known grant counts as granted.
        account.used, account.returned = max(account.used, line.used), max(account.returned, line.returned)
        account.granted = max(account.granted, line.granted, account.used + account.returned)
        if line.is_closing:
            # Including a grant in a lost response.
            account.granted = account.used + account.returned
            del self._leases[line.lease]
        row.held += account.outstanding

    def askers(self, lines: Sequence[LeaseReport]) -> list[LeaseReport]:
        """The lines that may be granted units: for each window only the latest lease."""
        latest: dict[tuple[Window, int], LeaseReport] = {}
        for line in sorted(lines):
            if line.want:
                latest[self._keys[line.lease]] = line
        return list(latest.values())

    def grant(self, line: LeaseReport) -> int:
        """The granted part of the requested units."""
        key = self._keys[line.lease]
        row, (_, ends) = self._rows[key], span(line.window.measure, key[1])
        if line.interval_seconds:
            return _grant(line, self._rates[line.lease][1], self._alive)
        if self._settles or self._now >= ends:
            return 0
        grant = _grant(line, line.limit - row.spent - row.held, self._alive)
        self._leases[line.lease].granted += grant
        row.held += grant
        own = sum(self._leases[lease].outstanding for lease in self._told if lease in self._leases
                  and self._leases[lease].key == key)  # fmt: skip
        if not grant and row.held > own:
            row.wanted_at, row.wanted_by = self._now, self._name
        return grant

    def reply(self, line: LeaseReport, grant: int) -> LeaseGrant:
        """The response line of a lease."""
        key = self._keys[line.lease]
        row = self._rows[key]
        if line.interval_seconds:
            return self._reply_rate(row, line, grant)
        account = self._leases.get(line.lease)
        granted = line.used + line.returned if account is None else account.granted
        _, ends = span(line.window.measure, key[1])
        return LeaseGrant(
            line.lease, key[1], granted, row.spent, row.held, ends - self._now, 0.0, self._is_wanted[line.lease]
        )

    def _key(self, line: LeaseReport) -> tuple[Window, int]:
        # If its first response was lost, a lease stays in its original window, which its holder does not know.
        if line.lease in self._leases:
            return self._leases[line.lease].key
        return line.window, span(line.window.measure, line.starts or self._now)[0]

    # GCRA: the theoretical arrival time is ahead of now by the units taken and not yet replenished.

    def _reply_rate(self, row: Row, line: LeaseReport, grant: int) -> LeaseGrant:
        ahead, available = self._rates[line.lease]
        ahead += grant * line.interval_seconds
        # The furthest of its lines applies.
        key = self._keys[line.lease]
        row.theoretical = self._moved[key] = max(self._now + ahead, self._moved.get(key, -math.inf))
        short = ahead + (line.at_least - line.limit) * line.interval_seconds
        wait_seconds = max(0.0, short) if line.want and not grant else 0.0
        held = line.limit - max(0, available - grant)
        return LeaseGrant(line.lease, 0, grant, 0, held, math.inf, wait_seconds, False)

    def _rate(self, row: Row, line: LeaseReport) -> tuple[float, int]:
        interval, tolerance = line.interval_seconds, line.limit * line.interval_seconds
        # A maximum applies because the clock may have been set back, or the burst lowered.
        ahead = min(max(row.theoretical, self._now) - self._now, tolerance)
        return ahead, math.floor((tolerance - ahead) / interval + 1e-6)


def _grant(line: LeaseReport, available: int, alive: int) -> int:
    if available < line.at_least:
        return 0
    if line.takes_all:
        return available
    # A holder leaves units for the others: the fewer remain, the fewer it is granted.
    share = line.want if alive <= 1 else max(line.at_least, available // (2 * alive))
    return min(line.want, available, share)


def span(measure: str, at: float) -> tuple[int, float]:
    """The start and end of the calendar window of an instant, in Unix time."""
    day = datetime.fromtimestamp(at, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if measure.endswith("_per_day"):
        return int(day.timestamp()), (day + timedelta(days=1)).timestamp()
    if measure.endswith("_per_month"):
        first = day.replace(day=1)
        return int(first.timestamp()), (first + timedelta(days=32)).replace(day=1).timestamp()
    return 0, math.inf
