"""The leases of this process, and what each request takes from them. Sans-IO: no waiting, no ledger requests.

    take         one synchronous step over all limits that apply: takes from all of them, or from none
    take_again   the same for a request that was charged before
    settle       marks what was taken as used, or releases it

`LeaseSync` exchanges the changes with the ledger, `LeaseBinding` determines which leases apply.

Requests are admitted from leases alone. If the leases do not suffice, `take` raises `Short` when a ledger request is
necessary, and a Refusal when the ledger refused a moment ago. The table uses a monotonic clock only; the current day
and its end come from the ledger. After `valid_until_mono` nothing is admitted, because the ledger may have charged the
leases as those of a dead process by then. Even if a suspended process spends one more unit before it notices, nothing
is spent twice: the ledger has charged lapsed leases in full.
"""

from __future__ import annotations

from collections.abc import Sequence

from keyproxy.limits import refusals
from keyproxy.limits.allowance import Allowance, Bundle, Hold, TokenNeed, amount_of
from keyproxy.limits.lease import Lease
from keyproxy.limits.lease_binding import LeaseBinding
from keyproxy.limits.lease_sync import LeaseSync, Short
from keyproxy.limits.ledger_protocol import TOKENS


class LeaseTable:
    """The leases of this process, as requests use them. Every operation is synchronous."""

    def __init__(self, sync: LeaseSync) -> None:
        self._sync = sync
        self._reviews = sync.reviews
        self._binding = LeaseBinding(sync)
        #: Take even if nothing is left, and settle later: the policy for when the ledger is unavailable.
        self.is_lenient = False

    # -- the path of a request

    def take(self, allowance: Allowance, now_mono: float, tokens: TokenNeed | None = None) -> Hold:
        """Take what a request needs from every limit that applies, or nothing.

        Raises Short if a ledger request is necessary, a Refusal if a limit is exceeded.
        """
        bundle = allowance.bundle or self._binding.bind(allowance, now_mono)
        if now_mono >= self._sync.valid_until_mono:
            return self._take_carefully(allowance, now_mono, tokens)
        hold = bundle.hold
        if tokens is not None and bundle.counts_tokens:
            amount = 0 if tokens.most is None else tokens.most
            if amount == 0 or amount > bundle.tokens_bound or not self._take_each(bundle.budgets, amount, now_mono):
                return self._take_carefully(allowance, now_mono, tokens)
            hold = Hold(bundle, bundle.budgets, amount)
        if not self._take_each(bundle.units, 1, now_mono):
            for lease in hold.budgets:
                lease.free += hold.tokens
            return self._take_carefully(allowance, now_mono, tokens)
        return hold

    def _take_each(self, leases: tuple[Lease, ...], amount: int, now_mono: float) -> bool:
        """Take this amount of each lease. False: one has less, and nothing was taken."""
        for number, lease in enumerate(leases):
            free = lease.free - amount
            if free < 0 or now_mono >= lease.ends_mono:
                for before in leases[:number]:
                    before.free += amount
                return False
            lease.free = free
            lease.piece = amount
            if not lease.is_noted:
                self._reviews.note_change(lease)
            if free < lease.low:
                self._reviews.make_urgent(lease)
        return True

    def take_again(self, allowance: Allowance, now_mono: float, tokens: TokenNeed | None, paid: int) -> Hold:
        """Take what a request needs that was charged before: units of rates, and tokens beyond the `paid` ones.

        Raises what `take` raises.
        """
        bundle, amount = self._examined(allowance, now_mono, tokens, paid)
        for lease in bundle.paced:
            self._take_units(lease, 1)
        if tokens is None or not bundle.counts_tokens:
            return Hold(bundle, (), 0, paid=paid)
        return self._holding(bundle, amount, paid)

    def check(
        self, allowance: Allowance, now_mono: float, tokens: TokenNeed | None = None, paid: int | None = None
    ) -> None:
        """Raise what `take` would raise (with `paid`: what `take_again` would), and take nothing."""
        self._examined(allowance, now_mono, tokens, paid)

    def has_refused(self, allowance: Allowance, now_mono: float) -> bool:
        """Whether the ledger recently refused one unit of a lease that every request needs. Cheap."""
        bundle = allowance.bundle
        if bundle is None:
            return False
        return any(lease.free < 1 and lease.is_refused(1, now_mono) for lease in bundle.reported)

    def release(self, hold: Hold) -> Hold:
        """Release the slots of a request that has ended before its charge is known. Return what is left to settle."""
        for lease in hold.bundle.slots:
            self._restore(lease, 1)
        return Hold(hold.bundle, hold.budgets, hold.tokens, hold.earlier, paid=hold.paid, has_slots=False)

    def settle(self, hold: Hold, *, was_sent: bool, tokens: int = 0, is_repeat: bool = False) -> None:
        """Settle a request that has ended. Not `was_sent`: the upstream received none of it, and nothing is charged.

        `tokens` is what the request used. Usage beyond the hold is charged too, against later grants.
        `is_repeat`: the request was charged before; this attempt is charged for its tokens only.
        """
        bundle = hold.bundle
        if hold.has_slots:
            for lease in bundle.slots:
                self._restore(lease, 1)
        if was_sent and not is_repeat:
            for lease in bundle.counted:
                lease.used += 1
                if not lease.is_noted:
                    self._reviews.note_change(lease)
        else:
            tokens = tokens if was_sent else 0
            for lease in () if hold.paid is not None else bundle.counted:
                if not lease.is_rate:
                    self._restore(lease, 1)
        if hold.budgets or hold.earlier is not None:
            self._settle_tokens(hold, tokens)

    def _settle_tokens(self, hold: Hold, tokens: int) -> None:
        if hold.earlier is not None:
            early = min(tokens, hold.earlier.tokens)
            self._settle_tokens(hold.earlier, early)
            tokens -= early
        back = hold.tokens - tokens
        for lease in hold.budgets:
            lease.used += tokens
            if not lease.is_noted:
                self._reviews.note_change(lease)
            if back > 0:
                # The released amount may suffice for a request that was refused a moment ago.
                lease.empty_until_mono = 0.0
            if lease.is_current:
                lease.free += back
            else:
                self._restore(lease, back)

    def extend(self, hold: Hold, tokens: int, now_mono: float) -> Hold:
        """Hold this many more tokens of every current budget. Raises Short or a Refusal, as `take` does."""
        hold = self.check_extension(hold, tokens, now_mono)
        for lease in hold.budgets:
            self._take_units(lease, tokens)
        return Hold(hold.bundle, hold.budgets, hold.tokens + tokens, hold.earlier, paid=hold.paid)

    def check_extension(self, hold: Hold, tokens: int, now_mono: float) -> Hold:
        """Raise what `extend` would raise, and take nothing. Return the hold to extend."""
        hold = self._continued(hold, now_mono)
        is_valid = now_mono < self._sync.valid_until_mono
        short = [(lease, tokens) for lease in hold.budgets if lease.free < tokens or not is_valid]
        if short and not self.is_lenient:
            self._refuse_or_request(short, hold.bundle.reported, now_mono, takes_all=False)
        return hold

    def _continued(self, hold: Hold, now_mono: float) -> Hold:
        """Return the same hold, or its successor if one of its leases has ended: an ended lease cannot be drawn on."""
        budgets = []
        for of_pool in hold.bundle.pools:
            self._binding.renew(of_pool, now_mono)
            budgets += [of_pool.leases[measure] for measure in TOKENS if measure in of_pool.leases]
        if tuple(budgets) == hold.budgets:
            return hold
        return Hold(hold.bundle, tuple(budgets), 0, hold, paid=hold.paid)

    def _restore(self, lease: Lease, units: int) -> None:
        self._reviews.note_change(lease)
        if lease.is_current or units < 0:
            lease.free += units
        else:
            # Its window is over, or its holder has ended: it cannot be used any more.
            lease.returned += units

    # -- when memory does not suffice

    def _take_carefully(self, allowance: Allowance, now_mono: float, tokens: TokenNeed | None) -> Hold:
        bundle, amount = self._examined(allowance, now_mono, tokens)
        for lease in bundle.units:
            self._take_units(lease, 1)
        return self._holding(bundle, amount, None) if amount else bundle.hold

    def _holding(self, bundle: Bundle, amount: int, paid: int | None) -> Hold:
        for lease in bundle.budgets:
            lease.piece = amount
            self._take_units(lease, amount)
        return Hold(bundle, bundle.budgets, amount, paid=paid)

    def _examined(
        self, allowance: Allowance, now_mono: float, tokens: TokenNeed | None, paid: int | None = None
    ) -> tuple[Bundle, int]:
        """Return what to take, and how many tokens. Raises Short or a Refusal if that is not possible."""
        bundle = self._binding.renewed(allowance, now_mono)
        is_valid = now_mono < self._sync.valid_until_mono
        units = bundle.units if paid is None else bundle.paced
        short = [(lease, 1) for lease in units if lease.free < 1 or not is_valid]
        amount, takes_all = 0, False
        if tokens is not None and bundle.counts_tokens:
            amount = max(0, amount_of(bundle, tokens) - (paid or 0))
            for lease in bundle.budgets:
                if amount > lease.limit:
                    raise refusals.never_fits(lease, amount, now_mono, bundle.reported)
            takes_all = tokens.most is None and bundle.tokens_per_request is None
            short += [
                (lease, amount)
                for lease in bundle.budgets
                if amount and (lease.free < amount or not is_valid or (takes_all and not lease.has_all))
            ]
        if short and not self.is_lenient:
            self._refuse_or_request(short, bundle.reported, now_mono, takes_all=takes_all)
        return bundle, amount

    def _take_units(self, lease: Lease, units: int) -> None:
        if not lease.number:
            # Taken before the first ledger request for it: it may exceed the limit, which is the policy; or nothing is
            # held, and the request may still use more.
            self._sync.open_lease(lease)
            self._reviews.make_urgent(lease)
        lease.free -= units
        self._reviews.note_change(lease)
        if lease.free < lease.low:
            self._reviews.make_urgent(lease)

    def _refuse_or_request(
        self, short: Sequence[tuple[Lease, int]], leases: Sequence[Lease], now_mono: float, *, takes_all: bool
    ) -> None:
        """Raise a Refusal if the ledger just refused one of them, else Short."""
        refused = [(lease, need) for lease, need in short if lease.is_refused(need, now_mono)]
        if refused:
            # The limit with the longest wait: after it, the other limits admit the request too.
            lease, need = max(refused, key=lambda pair: pair[0].retry_mono)
            raise refusals.refusal(lease, need, now_mono, leases)
        raise Short(short, takes_all=takes_all)
