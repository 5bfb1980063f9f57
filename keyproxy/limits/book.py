"""The book of this process: every lease it holds, and who may take what of them. Sans-IO: it never waits or asks.

    take       one synchronous step over all limits that apply: all of them give, or none
    settle     what was taken was used, or not
    lines      what the ledger should be told and asked now; apply, lost, ended: what became of it

A request is admitted from leases alone. Where they do not suffice, `Short` says that the ledger has to be asked, and a
Refusal that it has been asked a moment ago. The book lives by one clock, a monotonic one: which day it is, and when that
day ends, it hears from the ledger. After `valid_until_mono` nothing is admitted, since the ledger may have charged our
leases as those of a dead process by then. Even if a process that was stopped and woken spent one more unit before it
noticed: what lapses was charged in full, so that nothing is ever spent twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final
from weakref import WeakValueDictionary

from keyproxy.limits import told
from keyproxy.limits.allowance import Account, Allowance, Bundle, Hold, TokenNeed, amount_of
from keyproxy.limits.leases import CONCURRENCY, RATE, REQUESTS, TOKENS, Lease, Line, Pool, Reply, Window
from keyproxy.limits.plan import Plan

#: What was not used for so long goes back.
_IDLE_SECONDS: Final = 1.0

#: For how long "there is no more" is believed; a rate says itself when there will be.
_EMPTY_SECONDS: Final = 1.0
_VAIN_SECONDS: Final = 0.5


class Short(Exception):
    """The ledger has to be asked: leases with what this request needs of each."""

    def __init__(self, needs: Sequence[tuple[Lease, int]], *, takes_all: bool = False) -> None:
        super().__init__(", ".join(lease.window.policy for lease, _ in needs))
        self.needs = needs
        self.takes_all = takes_all


class Book:
    """See the module."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called when the ledger should be asked soon, at most once until it is."""
        self.valid_until_mono = 0.0
        #: Take although there is nothing left, and settle it later: the ledger cannot be asked, and that is the policy.
        self.is_lenient = False
        self._wake = wake
        self._is_woken = False
        self._accounts: WeakValueDictionary[Pool, Account] = WeakValueDictionary()
        #: The leases that the ledger has given something for, or is to give.
        self._active: dict[Lease, None] = {}
        self._urgent: dict[Lease, None] = {}
        self._open: dict[int, Lease] = {}
        self._closing: dict[int, Line] = {}
        self._numbers = 0

    # -- the path of a request

    def take(self, allowance: Allowance, now_mono: float, tokens: TokenNeed | None = None) -> Hold:
        """Take what a request needs of every limit it is under, or nothing.

        Raises Short if the ledger has to be asked, a Refusal if it may not go on.
        """
        bundle = allowance.bundle or self._bound(allowance, now_mono)
        if (tokens is not None and bundle.counts_tokens) or now_mono >= self.valid_until_mono:
            return self._take_carefully(allowance, now_mono, tokens)
        for lease in bundle.units:
            if lease.free < 1 or now_mono >= lease.ends_mono:
                return self._take_carefully(allowance, now_mono, tokens)
        for lease in bundle.units:
            free = lease.free = lease.free - 1
            if free < lease.low:
                self._soon(lease)
        return bundle.hold

    def check(self, allowance: Allowance, now_mono: float, tokens: TokenNeed | None = None) -> None:
        """Raises what `take` would raise, and takes nothing."""
        if allowance.bundle is None:
            self._bound(allowance, now_mono)
        self._examined(allowance, now_mono, tokens)

    def settle(self, hold: Hold, *, was_sent: bool, tokens: int = 0) -> None:
        """A request has ended. Not `was_sent`: the upstream saw nothing of it, and nothing is charged.

        `tokens` is what it used. More than was held is charged too, and drawn from what comes next.
        """
        for lease in hold.slots:
            self._restore(lease, 1)
        if was_sent:
            for lease in hold.units:
                lease.used += 1
        else:
            tokens = 0
            for lease in hold.units:
                if not lease.is_rate:
                    self._restore(lease, 1)
        for lease in hold.budgets:
            lease.used += tokens
            self._restore(lease, hold.tokens - tokens)

    def extend(self, hold: Hold, tokens: int, now_mono: float) -> Hold:
        """Hold so many tokens more of every budget. Raises Short or a Refusal, as `take` does."""
        self.check_extension(hold, tokens, now_mono)
        for lease in hold.budgets:
            self._take_units(lease, tokens)
        return hold._replace(tokens=hold.tokens + tokens)

    def check_extension(self, hold: Hold, tokens: int, now_mono: float) -> None:
        """Raises what `extend` would raise, and takes nothing."""
        is_valid = now_mono < self.valid_until_mono
        short = [(lease, tokens) for lease in hold.budgets if lease.free < tokens or not is_valid]
        if short and not self.is_lenient:
            self._refuse_or_ask(short, hold.told, now_mono, takes_all=False)

    def _restore(self, lease: Lease, units: int) -> None:
        if lease.is_current:
            lease.free += units
        elif units > 0:
            # Its window is over, or its holder has ended: nobody can use it any more.
            lease.returned += units

    # -- when memory does not suffice

    def _take_carefully(self, allowance: Allowance, now_mono: float, tokens: TokenNeed | None) -> Hold:
        bundle, amount = self._examined(allowance, now_mono, tokens)
        if self.is_lenient:
            for lease in (*bundle.units, *bundle.budgets):
                if not lease.number:
                    self._open_lease(lease)
        for lease in bundle.units:
            self._take_units(lease, 1)
        if not amount:
            return bundle.hold
        for lease in bundle.budgets:
            self._take_units(lease, amount)
        return bundle.hold._replace(budgets=bundle.budgets, tokens=amount)

    def _examined(self, allowance: Allowance, now_mono: float, tokens: TokenNeed | None) -> tuple[Bundle, int]:
        """What is to be taken, and how many tokens. Raises Short or a Refusal if it cannot be."""
        bundle = self._renewed(allowance, now_mono)
        is_valid = now_mono < self.valid_until_mono
        short = [(lease, 1) for lease in bundle.units if lease.free < 1 or not is_valid]
        amount, takes_all = 0, False
        if tokens is not None and bundle.counts_tokens:
            amount = amount_of(bundle, tokens)
            takes_all = tokens.most is None and bundle.tokens_per_request is None
            short += [
                (lease, amount)
                for lease in bundle.budgets
                if lease.free < amount or not is_valid or (takes_all and not lease.has_all)
            ]
        if short and not self.is_lenient:
            self._refuse_or_ask(short, bundle.hold.told, now_mono, takes_all=takes_all)
        return bundle, amount

    def _take_units(self, lease: Lease, units: int) -> None:
        lease.free -= units
        if lease.free < lease.low:
            self._soon(lease)

    def _refuse_or_ask(
        self, short: Sequence[tuple[Lease, int]], leases: Sequence[Lease], now_mono: float, *, takes_all: bool
    ) -> None:
        """Raises a Refusal if the ledger has just said no to one of them, else Short."""
        refused = [(lease, need) for lease, need in short if lease.is_refused(need, now_mono)]
        if refused:
            # The one that takes longest: who waits for it is let in by the others too.
            lease, need = max(refused, key=lambda pair: pair[0].retry_mono)
            raise told.refusal(lease, need, now_mono, leases)
        raise Short(short, takes_all=takes_all)

    def _bound(self, allowance: Allowance, now_mono: float) -> Bundle:
        accounts = []
        for pool, plan in allowance.pools:
            account = self._accounts.get(pool)
            if account is None:
                account = self._accounts[pool] = Account(pool)
            if account.plan != plan:
                self._replan(account, plan, now_mono)
            accounts.append(account)
        bundle = allowance.bundle = Bundle(tuple(accounts))
        return bundle

    def _replan(self, account: Account, plan: Plan, now_mono: float) -> None:
        """Another plan: what lies free was granted under the old one and goes back."""
        account.plan = plan
        before, account.leases = account.leases, {}
        for measure in (CONCURRENCY, RATE, *REQUESTS, *TOKENS):
            lease = before.pop(measure, None)
            if getattr(plan, measure) is None:
                if lease is not None:
                    self._retire(lease)
                continue
            if lease is None:
                lease = Lease(Window(account.pool, measure), plan, now_mono)
            else:
                lease.replan(plan)
                lease.empty_until_mono = 0.0
                if lease.free > 0:
                    lease.give_back(lease.free)
            account.leases[measure] = lease

    def _renewed(self, allowance: Allowance, now_mono: float) -> Bundle:
        """The bundle, with a new lease for each whose window or holder has ended."""
        bundle = allowance.bundle
        assert bundle is not None  # noqa: S101 - who calls has bound it
        for account in bundle.accounts:
            for measure, lease in account.leases.items():
                self._lapse(lease, now_mono)
                if not lease.is_current:
                    account.leases[measure] = Lease(lease.window, account.plan, now_mono)
        if not all(lease.is_current for lease in (*bundle.units, *bundle.budgets)):
            bundle = allowance.bundle = Bundle(bundle.accounts)
        return bundle

    def _lapse(self, lease: Lease, now_mono: float) -> None:
        """What is free of a lease whose time is over is free no more."""
        if not lease.number or now_mono < lease.ends_mono:
            return
        if lease.is_rate:
            lease.returned += max(0, lease.free)
            lease.free = min(0, lease.free)
        else:
            self._retire(lease)

    def _retire(self, lease: Lease) -> None:
        if lease.is_current:
            lease.is_current = False
            if lease.free > 0:
                lease.give_back(lease.free)

    def _soon(self, lease: Lease) -> None:
        self._urgent[lease] = None
        if not self._is_woken:
            self._is_woken = True
            self._wake()

    # -- what the ledger is told

    def ask(self, short: Short) -> None:
        """Ask the ledger soon for what a request was short of."""
        for lease, need in short.needs:
            lease.ask(need, takes_all=short.takes_all and lease.window.measure in TOKENS)
            self._soon(lease)

    def asked_in_vain(self, short: Short, now_mono: float) -> None:
        """Others hold it and did not give it back in time: say no for a moment, instead of waiting with everyone."""
        for lease, need in short.needs:
            if lease.free < need:
                lease.empty_need = need
                lease.empty_until_mono = max(lease.empty_until_mono, now_mono + _VAIN_SECONDS)

    @property
    def has_leases(self) -> bool:
        """Whether there is anything that would lapse."""
        return bool(self._active or self._closing)

    @property
    def has_news(self) -> bool:
        """Whether there is anything that the ledger has not confirmed. Looks at every lease: for metrics."""
        return bool(self._closing) or any(lease.has_news for lease in self._active)

    @property
    def outstanding(self) -> int:
        """How many leases are outstanding."""
        return len(self._active)

    def lines(self, now_mono: float, *, all_of_them: bool, is_last: bool = False) -> list[Line]:
        """What to tell the ledger now: of the leases that are short, or of all that have changed.

        `is_last`: everything goes back. The next lines may be asked for once these were answered, or are lost.
        """
        self._is_woken = False
        urgent, self._urgent = self._urgent, {}
        lines = list(self._closing.values())
        for lease in {**self._active, **urgent} if all_of_them else urgent:
            self._tidy(lease, now_mono, is_last=is_last)
            line = self._line(lease, now_mono)
            if line is not None:
                lines.append(line)
        return lines

    def _line(self, lease: Lease, now_mono: float) -> Line | None:
        if lease.number:
            if not lease.need and lease.is_done:
                return self._closed(lease, now_mono)
            is_low = lease.is_current and lease.free < lease.low
            if not (lease.need or is_low or lease.has_news):
                return None
        elif lease.need:
            self._open_lease(lease)
        else:
            return None
        line = lease.line(now_mono)
        self._open[line.lease] = lease
        return line

    def _open_lease(self, lease: Lease) -> None:
        self._numbers += 1
        lease.number = self._numbers
        self._active[lease] = None

    def _closed(self, lease: Lease, now_mono: float) -> Line | None:
        """All of it was used or returned: the ledger may forget it. The next one begins at zero."""
        line = None
        if not lease.is_rate:
            line = self._closing[lease.number] = lease.line(now_mono, is_closing=True)
        self._active.pop(lease, None)
        lease.begin_anew()
        return line

    def _tidy(self, lease: Lease, now_mono: float, *, is_last: bool) -> None:
        """Give back what nobody needs here."""
        self._lapse(lease, now_mono)
        taken = lease.taken
        if taken != lease.touched_taken:
            lease.touched_taken, lease.touched_mono = taken, now_mono
        is_idle = now_mono - lease.touched_mono >= _IDLE_SECONDS
        if is_idle or is_last or now_mono < lease.is_wanted_until:
            lease.low = 0
            if lease.free > 0 and not lease.need:
                lease.give_back(lease.free)

    def apply(
        self, lines: Sequence[Line], replies: Sequence[Reply], asked_mono: float, *, valid_seconds: float
    ) -> None:
        """The ledger has answered. `valid_seconds`: for how long after it was asked the leases are ours."""
        self.valid_until_mono = asked_mono + valid_seconds
        asked = {line.lease: line for line in lines}
        for reply in replies:
            line = asked.pop(reply.lease)
            lease = self._open.pop(reply.lease, None)
            if line.is_closing:
                self._closing.pop(line.lease, None)
            elif lease is not None:
                before = lease.granted
                lease.apply(line, reply, asked_mono)
                self._note_refusal(lease, line, lease.granted - before, asked_mono)
        self.lost(list(asked.values()))

    def _note_refusal(self, lease: Lease, line: Line, got: int, asked_mono: float) -> None:
        if got or not line.want or (lease.others_held and not lease.is_rate):
            return
        reply_wait = max(0.0, lease.retry_mono - asked_mono) if lease.is_rate else _EMPTY_SECONDS
        lease.empty_need = line.at_least + max(0, lease.free)
        lease.empty_until_mono = asked_mono + reply_wait

    def lost(self, lines: Sequence[Line]) -> None:
        """Nobody knows what became of these lines. They are told again: everything in them is cumulative."""
        for line in lines:
            self._open.pop(line.lease, None)

    def ended(self) -> None:
        """The ledger has ended this holder: its leases are charged in full. What is in use is paid for already."""
        for lease in self._active:
            lease.is_current = False
            lease.free = 0
        self._active.clear()
        self._urgent.clear()
        self._open.clear()
        self._closing.clear()
        self.valid_until_mono = 0.0
