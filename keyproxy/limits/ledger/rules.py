"""The rules of the ledger as a program: what a report changes, what is granted, when a holder ends.

This is the specification. PostgreSQL (migrations/0023_agent_budgets.sql) and Redis (ledger.lua) implement the same rules;
tests compare every backend with this one, message by message. `key explain` applies it to the current state of the real
ledger, to predict a decision without changing anything. Rates follow `gcra`, and messages about windows with many holders
`message_schedule`.

Pure: the state is in memory, and every operation has an argument `now`, Unix time. docs/ledger.md has the proof that no
window exceeds its limit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Final

from keyproxy.limits import gcra
from keyproxy.limits.calendar_windows import span
from keyproxy.limits.ledger import message_schedule
from keyproxy.limits.ledger.accounts import Holder, LeaseAccount, Replica, WindowAccount, WindowStart
from keyproxy.limits.ledger_protocol import CONCURRENCY, TOKEN_RATE, LeaseGrant, LeaseReport, Window

#: How long other holders are asked to return idle units after a holder could not get any.
_WANTED_SECONDS: Final = 2.0

#: How often a window's units are recalled, from at most how many holders; fewer if many processes compete for them.
_RECALL_SECONDS: Final = 0.5
_RECALLED_MAX: Final = 100
_RECALLED_IF_AHEAD: Final = 12

#: How long a ledger that lost history accepts claims of leases from holders that rest or are not stored.
_CLAIMED_SECONDS: Final = 86_400.0


class LateMessageError(Exception):
    """A later message of the same holder was processed already; this one changes nothing."""


class LedgerRules:
    """A ledger in memory. Every time is Unix time."""

    def __init__(self, *, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self.windows: dict[WindowStart, WindowAccount] = {}
        self.holders: dict[str, Holder] = {}
        self.settles_until = self.lost_at = -math.inf

    def account(self, carried: int) -> WindowAccount:
        """The account of a new window, which expects so many holders."""
        return WindowAccount(carried=carried)

    def sync(self, name: str, serial: int, lines: Sequence[LeaseReport], now: float) -> list[LeaseGrant] | None:
        """Process one message of a holder. None: this holder has ended. Raises LateMessageError."""
        known = self.holders.get(name)
        if known is None or known.rests:
            # Its grants were charged when the holder ended, or are in the lost history.
            claims = any(line.granted and not line.interval_seconds and not line.is_closing for line in lines)
            if claims and now >= self.lost_at + _CLAIMED_SECONDS:
                return None
        holder = self.holders.setdefault(name, Holder(0, 0.0))
        if holder.has_ended:
            return None
        if serial <= holder.serial:
            raise LateMessageError(f"message {serial} arrived after message {holder.serial}")
        holder.serial, holder.expires_at, holder.rests = serial, now + self.lease_seconds, False
        message = _Message(self, name, now)
        for line in lines:
            message.settle(line)
        message.schedule()
        grants = {line.lease: message.grant(line) for line in message.askers(lines)}
        replies = [message.reply(line, grants.get(line.lease, 0)) for line in lines]
        settles_seconds = self.settles_until - now
        return [LeaseGrant(0, 0, 0, 0, 0, 0.0, settles_seconds, False), *replies] if settles_seconds > 0 else replies

    def recalled(self, name: str) -> list[int]:
        """The leases whose idle units a holder shall return; it has not reported them since."""
        holder = self.holders.get(name)
        return [] if holder is None else [number for number, lease in holder.leases.items() if lease.is_recalled]

    def reap(self, now: float) -> None:
        """End expired holders."""
        if now < self.settles_until:
            # A holder that seems dead may have sent messages in the lost history.
            return
        for name, holder in self.holders.items():
            if holder.is_live and holder.expires_at <= now:
                if holder.leases:
                    self.end(name)
                else:
                    holder.rests = True

    def forget(self, after_seconds: float, now: float) -> None:
        """Delete holders that rest or have ended, `after_seconds` after their expiry."""
        before = now - after_seconds
        for name, holder in list(self.holders.items()):
            if not holder.is_live and holder.expires_at < before:
                del self.holders[name]

    def end(self, name: str) -> None:
        """End a holder: what it has not returned is charged, concurrency slots are released."""
        holder = self.holders.get(name)
        if holder is None or holder.has_ended:
            return
        holder.has_ended = True
        for lease in holder.leases.values():
            window = self.windows[lease.key]
            window.held -= lease.outstanding
            if lease.key[0].measure != CONCURRENCY:
                window.spent += lease.outstanding
                window.forfeited += lease.outstanding
            window.leases.pop(name, None)
        holder.leases.clear()

    def credit(self, window: Window, amount: int, now: float) -> None:
        """Add an amount to the limit of a current window."""
        key = window, span(window.measure, now)[0]
        self.windows.setdefault(key, WindowAccount()).credited += amount

    # -- losing history

    @property
    def has_lost_history(self) -> bool:
        """Whether it has ever failed over."""
        return self.lost_at > -math.inf

    def replica(self) -> Replica:
        """The state that a replica has received."""
        return copy.deepcopy((self.windows, self.holders))

    def fail_over(self, replica: Replica, now: float) -> None:
        """Fail over to a replica that lags behind: nothing is granted for the duration of a lease."""
        self.windows, self.holders = copy.deepcopy(replica)
        self.lost_at = now
        self.settles_until = now + self.lease_seconds


class _Message:
    """One message: settle all lines, then grant available units, then reply."""

    def __init__(self, ledger: LedgerRules, name: str, now: float) -> None:
        self._windows, self._holders, self._name, self._now = ledger.windows, ledger.holders, name, now
        self._ledger = ledger
        self._leases = ledger.holders[name].leases
        self._settles = now < ledger.settles_until
        self._alive = sum(1 for other in ledger.holders.values() if other.is_live and other.expires_at > now)
        self._is_wanted: dict[int, bool] = {}
        #: The leases that this message reports.
        self._reported: set[int] = set()
        self._keys: dict[int, WindowStart] = {}
        #: For lines of a rate: how far ahead it is and the available units; and its state after this message.
        self._rates: dict[int, tuple[float, int]] = {}
        self._moved: dict[WindowStart, float] = {}
        #: For other windows: how many holders there were before this message, or are expected.
        self._crowds: dict[WindowStart, int] = {}
        #: The leases that it opens, and the windows of which units were short before.
        self._new: set[int] = set()
        self._short: set[WindowStart] = set()

    def settle(self, line: LeaseReport) -> None:
        """Apply the report of a lease."""
        key = self._keys[line.lease] = self._key(line)
        window = self._account(key)
        window.limit = line.limit
        if self._now - window.wanted_at < _WANTED_SECONDS:
            self._short.add(key)
        is_wanted = key in self._short and window.wanted_by != self._name
        is_known = line.lease in self._leases
        if line.interval_seconds:
            ahead = gcra.ahead_seconds(window.theoretical, self._now, line.limit, line.interval_seconds)
            if line.window.measure == TOKEN_RATE:
                ahead = gcra.ahead_after_return(
                    ahead, line.returned, line.limit, line.interval_seconds, self._now - line.granted_at
                )
            self._rates[line.lease] = ahead, gcra.units_available(ahead, line.limit, line.interval_seconds)
            return
        self._crowds.setdefault(key, window.holders(self._now))
        self._is_wanted[line.lease] = is_wanted and not self._are_many(key)
        # A lease that is closed already stays closed.
        if line.is_closing and not is_known:
            return
        window.leases[self._name] += not is_known
        if not is_known:
            self._new.add(line.lease)
        lease = self._leases.setdefault(line.lease, LeaseAccount(key))
        lease.is_recalled = False
        self._reported.add(line.lease)
        window.held -= lease.outstanding
        window.spent += max(0, line.used - lease.used)
        # The report restores grants in lost history. Use beyond the grant counts as granted.
        lease.used, lease.returned = max(lease.used, line.used), max(lease.returned, line.returned)
        lease.granted = max(lease.granted, line.granted, lease.used + lease.returned)
        if line.is_closing:
            # Also what was granted in a reply that was lost.
            lease.granted = lease.used + lease.returned
            del self._leases[line.lease]
            window.leases[self._name] -= 1
            if not window.leases[self._name]:
                del window.leases[self._name]
        window.held += lease.outstanding

    def schedule(self) -> None:
        """Count this message in the schedules of windows with many holders."""
        opened = {self._keys[number] for number in self._new}
        for key in self._crowds:
            if self._are_many(key):
                self._take_places(key, message_schedule.PLACES_OF_NEW if key in opened else 1)

    def _are_many(self, key: WindowStart) -> bool:
        return message_schedule.applies(self._crowds[key])

    def _take_places(self, key: WindowStart, places: int) -> None:
        window = self._windows[key]
        window.theoretical = message_schedule.extended(window.theoretical, self._now, places, self._crowds[key])

    def _account(self, key: WindowStart) -> WindowAccount:
        """The account of a window, which expects the holders of its predecessor when it is opened."""
        account = self._windows.get(key)
        if account is None:
            window, starts = key
            before = self._windows.get((window, span(window.measure, starts - 1)[0])) if starts else None
            account = self._windows[key] = self._ledger.account(len(before.leases) if before else 0)
            account.carried_until = self._now + message_schedule.expected_seconds(account.carried)
        return account

    def askers(self, lines: Sequence[LeaseReport]) -> list[LeaseReport]:
        """The lines that may get a grant: of those that want units of one window, only the latest lease."""
        latest: dict[WindowStart, LeaseReport] = {}
        for line in sorted(lines):
            if line.want:
                latest[self._keys[line.lease]] = line
        return list(latest.values())

    def grant(self, line: LeaseReport) -> int:
        """Grant a line as many units as possible, and return their number."""
        if line.interval_seconds:
            return line.units_granted(self._rates[line.lease][1], self._alive)
        key = self._keys[line.lease]
        window, (_, ends) = self._windows[key], span(line.window.measure, key[1])
        if self._settles or self._now >= ends:
            return 0
        available = line.limit + window.credited - window.spent - window.held
        share = self._share(line, key, available) if self._are_many(key) else 0
        granted = line.units_granted(available, self._alive, share)
        self._leases[line.lease].granted += granted
        window.held += granted
        reported = [self._leases[number] for number in self._reported if number in self._leases]
        own = sum(lease.outstanding for lease in reported if lease.key == key)
        if not granted and self._are_many(key):
            self._take_places(key, message_schedule.PLACES_OF_REFUSED)
        if not granted and window.held > own:
            is_ahead = self._are_many(key) and message_schedule.is_ahead(window.theoretical, self._now)
            if line.at_least <= available + window.held and self._now - window.recalled_at >= _RECALL_SECONDS:
                window.recalled_at = self._now
                units = window.held if key in self._short else line.at_least - max(0, available)
                self._recall(key, units, _RECALLED_IF_AHEAD if is_ahead else _RECALLED_MAX)
            window.wanted_at, window.wanted_by = self._now, self._name
        return granted

    def _share(self, line: LeaseReport, key: WindowStart, available: int) -> int:
        """What a line gets of a window with many holders, at least."""
        window, holders = self._windows[key], self._crowds[key]
        if key in self._short:
            # Others are short: half of what they hold on average, which is used up soon.
            return min(line.want // 2, window.held // (2 * holders))
        if not (line.most and line.lease in self._new):
            # Enough until its next report: smaller slices would be used up sooner, and requested again.
            return line.want // 2
        return max(
            line.want // 2, min(message_schedule.first_units(line.want, holders), available // (4 * self._alive))
        )

    def _recall(self, key: WindowStart, units: int, at_most: int) -> None:
        """Recall units from as few other holders as suffice, those that hold most first, and from `at_most` of them."""
        leases = [
            (-lease.outstanding, name, number, lease)
            for name, holder in self._holders.items() if name != self._name
            for number, lease in holder.leases.items()
            if lease.key == key and lease.outstanding > 0 and not lease.is_recalled
        ]  # fmt: skip
        for outstanding, _, _, lease in sorted(leases, key=lambda entry: entry[:3])[:at_most]:
            if units <= 0:
                break
            lease.is_recalled = True
            units += outstanding

    def reply(self, line: LeaseReport, granted_now: int) -> LeaseGrant:
        """The reply to a line."""
        if line.interval_seconds:
            return self._reply_rate(line, granted_now)
        key = self._keys[line.lease]
        window, lease = self._windows[key], self._leases.get(line.lease)
        granted = line.used + line.returned if lease is None else lease.granted
        ends_seconds = span(line.window.measure, key[1])[1] - self._now
        holders, wait_seconds = window.holders(self._now), 0.0
        if self._are_many(key):
            ends = window.theoretical
            holders = message_schedule.pacing_holders(ends, self._now, holders)
            if not self._settles and ends_seconds > 0:
                is_short, is_refused = key in self._short, line.want > 0 and not granted_now
                wait_seconds = message_schedule.wait_seconds(ends, self._now, is_short=is_short, is_refused=is_refused)
        return LeaseGrant(
            line.lease, key[1], granted, window.spent, window.held, ends_seconds, wait_seconds,
            self._is_wanted[line.lease], window.credited, holders,
        )  # fmt: skip

    def _reply_rate(self, line: LeaseReport, granted: int) -> LeaseGrant:
        key, (ahead, available) = self._keys[line.lease], self._rates[line.lease]
        ahead += granted * line.interval_seconds
        # If several lines are about one rate, the furthest ahead counts.
        self._moved[key] = max(self._now + ahead, self._moved.get(key, -math.inf))
        self._windows[key].theoretical = self._moved[key]
        wait = gcra.wait_seconds(ahead, line.at_least, line.limit, line.interval_seconds)
        held = line.limit - max(0, available - granted)
        return LeaseGrant(
            line.lease, 0, granted, 0, held, math.inf, wait if line.want and not granted else 0.0, False,
            granted_at=self._now,
        )  # fmt: skip

    def _key(self, line: LeaseReport) -> WindowStart:
        # A lease whose first reply was lost stays in the window in which it started, which its holder does not know.
        if line.lease in self._leases:
            return self._leases[line.lease].key
        return line.window, span(line.window.measure, line.starts or self._now)[0]
