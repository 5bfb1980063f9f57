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
from keyproxy.limits.allowance import Allowance, Bundle, Hold, Need
from keyproxy.limits.lease import Lease
from keyproxy.limits.lease_binding import LeaseBinding
from keyproxy.limits.lease_sync import LeaseShortage, LeaseSync, Short
from keyproxy.limits.ledger_protocol import BUDGETS, SPEND
from keyproxy.reasons import Reason, Refusal


class LeaseTable:
    """The leases of this process, as requests use them. Every operation is synchronous."""

    def __init__(self, sync: LeaseSync) -> None:
        self._sync = sync
        self._reviews = sync.reviews
        self._binding = LeaseBinding(sync)
        #: Take even if nothing is left, and settle later: the policy for when the ledger is unavailable.
        self.is_lenient = False

    # -- the path of a request

    def take(self, allowance: Allowance, now_mono: float, need: Need | None = None) -> Hold:
        """Take what a request needs from every limit that applies, or nothing. None: it is not metered.

        Takes the most that it can use, or what is left of it where that is at least what it needs. Raises Short if a
        ledger request is necessary, a Refusal if a limit is exceeded.
        """
        bundle = allowance.bundle
        if bundle is None:
            bundle = self._binding.bundle(allowance, need, now_mono)
        if now_mono >= self._sync.valid_until_mono:
            return self._take_carefully(allowance, now_mono, need)
        if need is None or not bundle.is_metered:
            if not self._take_each(bundle.units, 1, now_mono):
                return self._take_carefully(allowance, now_mono, need)
            return bundle.shared_hold()
        tokens, spend = need.tokens_most, need.spend_most
        if tokens > bundle.tokens_bound or spend > bundle.spend_bound or not need.is_priced:
            return self._take_carefully(allowance, now_mono, need)
        if not self._take_each(bundle.token_leases, tokens, now_mono):
            return self._take_carefully(allowance, now_mono, need)
        if not self._take_each(bundle.spend_windows, spend, now_mono):
            _put_back(bundle.token_leases, tokens)
            return self._take_carefully(allowance, now_mono, need)
        if not self._take_each(bundle.units, 1, now_mono):
            _put_back(bundle.token_leases, tokens)
            _put_back(bundle.spend_windows, spend)
            return self._take_carefully(allowance, now_mono, need)
        if bundle.token_rates:
            return Hold(bundle, bundle, tokens, spend, granted_at=_granted_at(bundle))
        return Hold(bundle, bundle, tokens, spend)

    def _take_each(self, leases: tuple[Lease, ...], amount: int, now_mono: float) -> bool:
        """Take this amount of each lease. False: one has less, and nothing was taken."""
        if not amount:
            return True
        for number, lease in enumerate(leases):
            free = lease.free - amount
            if free < 0 or now_mono >= lease.ends_mono:
                _put_back(leases[:number], amount)
                return False
            lease.free = free
            lease.piece = amount
            if not lease.is_noted:
                self._reviews.note_change(lease)
            if free < lease.low:
                self._reviews.note_low(lease)
        return True

    def take_again(self, allowance: Allowance, now_mono: float, need: Need | None, paid: int) -> Hold:
        """Take what a request needs that was charged before: units of rates, and tokens beyond the `paid` ones.

        It takes the same part of its money as of its tokens. Raises what `take` raises.
        """
        bundle, tokens, spend = self._examined(allowance, now_mono, need, paid)
        for lease in bundle.paced:
            self._take_units(lease, 1)
        if need is None or not bundle.is_metered:
            return Hold(bundle, paid=paid)
        return self._holding(bundle, tokens, spend, paid)

    def check(self, allowance: Allowance, now_mono: float, need: Need | None = None, paid: int | None = None) -> None:
        """Raise what `take` would raise (with `paid`: what `take_again` would), and take nothing."""
        self._examined(allowance, now_mono, need, paid)

    def has_refused(self, allowance: Allowance, now_mono: float, need: Need | None = None) -> bool:
        """Whether the ledger recently refused one unit of a lease that the request needs. Cheap."""
        if not allowance.has_selectors and allowance.bundle is None:
            return False
        bundle = self._binding.bundle(allowance, need, now_mono)
        return any(lease.free < 1 and lease.is_refused(1, now_mono) for lease in bundle.leases)

    def take_slots(self, allowance: Allowance, now_mono: float, need: Need | None = None) -> Hold | None:
        """Take only the concurrency slots of a request, from memory: while its body is read. `release` puts them back.

        None: there are none to take, or `take` has to request them. Raises a Refusal if the ledger just refused one.
        """
        bundle = self._binding.bundle(allowance, need, now_mono)
        slots = bundle.slots
        if not slots or now_mono >= self._sync.valid_until_mono:
            return None
        if self._take_each(slots, 1, now_mono):
            return Hold(bundle)
        for lease in slots:
            if lease.free < 1 and lease.is_refused(1, now_mono):
                raise refusals.refusal(lease, 1, now_mono, bundle.leases)
        return None

    def per_request(self, allowance: Allowance, now_mono: float, need: Need) -> tuple[int | None, int | None]:
        """The lowest limits of tokens and of money per request for requests with this route and these models."""
        bundle = self._binding.bundle(allowance, need, now_mono)
        tokens, spend = bundle.tokens_per_request, bundle.spend_per_request
        return None if tokens is None else tokens.remaining, None if spend is None else spend.remaining

    def trim(self, hold: Hold, tokens: int, spend: int) -> Hold:
        """Put back what a request that was just admitted will not use: it keeps this many tokens and this money."""
        meters = hold.meters
        if meters is None or (tokens >= hold.tokens and spend >= hold.spend):
            return hold
        tokens, spend = min(tokens, hold.tokens), min(spend, hold.spend)
        for lease in meters.token_leases:
            self._restore(lease, hold.tokens - tokens)
        for lease in meters.spend_windows:
            self._restore(lease, hold.spend - spend)
        return _like(hold, tokens, spend)

    def release(self, hold: Hold) -> Hold:
        """Release the slots of a request that has ended before its charge is known. Return what is left to settle."""
        for lease in hold.bundle.slots:
            self._restore(lease, 1)
        return _like(hold, hold.tokens, hold.spend, has_slots=False)

    def settle(
        self, hold: Hold, *, was_sent: bool, tokens: int = 0, spend: int = 0, is_repeat: bool = False
    ) -> None:  # fmt: skip
        """Settle a request that has ended. Not `was_sent`: the upstream received none of it, and nothing is charged.

        `tokens` and `spend` (micro-units) are what the request used. Usage beyond the hold is charged too, against
        later grants. `is_repeat`: the request was charged before; this attempt is charged for these only.
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
            if not was_sent:
                tokens = spend = 0
            for lease in () if hold.paid is not None else bundle.counted:
                if not lease.is_rate:
                    self._restore(lease, 1)
        if hold.meters is not None:
            self._settle_amounts(hold, hold.meters, tokens, spend)

    def _settle_amounts(self, hold: Hold, meters: Bundle, tokens: int, spend: int) -> None:
        earlier = hold.earlier
        if earlier is not None and earlier.meters is not None:
            early, early_spend = min(tokens, earlier.total_tokens), min(spend, earlier.total_spend)
            self._settle_amounts(earlier, earlier.meters, early, early_spend)
            tokens, spend = tokens - early, spend - early_spend
        self._settle_each(meters.token_windows, hold.tokens, tokens)
        if meters.spend_windows:
            self._settle_each(meters.spend_windows, hold.spend, spend)
        for lease in meters.token_rates:
            lease.return_units(hold.tokens - tokens, hold.granted_at)
            if lease.has_news and not lease.number:
                self._open(lease)
            self._reviews.note_change(lease)

    def _settle_each(self, leases: tuple[Lease, ...], held: int, used: int) -> None:
        back = held - used
        for lease in leases:
            lease.used += used
            if used and not lease.number:
                # It was closed meanwhile, or never requested: this request held nothing of it.
                self._open(lease)
            if not lease.is_noted:
                self._reviews.note_change(lease)
            if back > 0:
                # The released amount may suffice for a request that was refused a moment ago.
                lease.empty_until_mono = 0.0
            if lease.is_current:
                lease.free += back
            else:
                self._restore(lease, back)

    def extend(self, hold: Hold, tokens: int, now_mono: float, spend: int = 0) -> Hold:
        """Hold this much more of every current window of tokens and money. Raises Short or a Refusal, as `take` does."""
        hold = self.check_extension(hold, tokens, now_mono, spend)
        meters = hold.meters
        if meters is None:
            return hold
        for lease in meters.token_leases:
            self._take_units(lease, tokens)
        for lease in meters.spend_windows:
            self._take_units(lease, spend)
        return _like(hold, hold.tokens + tokens, hold.spend + spend, granted_at=hold.granted_at or _granted_at(meters))

    def check_extension(self, hold: Hold, tokens: int, now_mono: float, spend: int = 0) -> Hold:
        """Raise what `extend` would raise, and take nothing. Return the hold to extend."""
        hold = self._continued(hold, now_mono)
        meters = hold.meters
        if meters is None:
            return hold
        is_valid = now_mono < self._sync.valid_until_mono
        wanted = [(lease, tokens) for lease in meters.token_leases] + [(lease, spend) for lease in meters.spend_windows]
        short = [LeaseShortage(lease, units, units) for lease, units in wanted if lease.free < units or not is_valid]
        if short and not self.is_lenient:
            self._refuse_or_request(short, meters.leases, now_mono, hold)
        return hold

    def _continued(self, hold: Hold, now_mono: float) -> Hold:
        """Return the same hold, or its successor if one of its leases has ended."""
        if hold.meters is None:
            return hold
        meters = self._binding.current(hold.meters, now_mono)
        if meters is hold.meters:
            return hold
        before = hold.meters
        if meters.token_leases == before.token_leases and meters.spend_windows == before.spend_windows:
            return hold
        return Hold(hold.bundle, meters, earlier=hold, paid=hold.paid, has_slots=hold.has_slots)

    def _restore(self, lease: Lease, units: int) -> None:
        if not lease.is_noted:
            self._reviews.note_change(lease)
        if lease.is_current or units < 0:
            lease.free += units
        else:
            # Its window is over, or its holder has ended: it cannot be used any more.
            lease.returned += units

    # -- when memory does not suffice

    def _take_carefully(self, allowance: Allowance, now_mono: float, need: Need | None) -> Hold:
        bundle, tokens, spend = self._examined(allowance, now_mono, need)
        for lease in bundle.units:
            self._take_units(lease, 1)
        if need is None or not bundle.is_metered:
            return bundle.shared_hold()
        return self._holding(bundle, tokens, spend, None)

    def _holding(self, bundle: Bundle, tokens: int, spend: int, paid: int | None) -> Hold:
        granted_at = _granted_at(bundle)
        for lease in bundle.token_leases if tokens else ():
            lease.piece = tokens
            self._take_units(lease, tokens)
        for lease in bundle.spend_windows if spend else ():
            lease.piece = spend
            self._take_units(lease, spend)
        return Hold(bundle, bundle, tokens, spend, paid=paid, granted_at=granted_at)

    def _examined(
        self, allowance: Allowance, now_mono: float, need: Need | None, paid: int | None = None
    ) -> tuple[Bundle, int, int]:
        """Return what to take, and how many tokens and how much money. Raises Short or a Refusal if it is not there."""
        bundle = self._binding.renewed(allowance, need, now_mono)
        is_valid = now_mono < self._sync.valid_until_mono
        units = bundle.units if paid is None else bundle.paced
        short = [LeaseShortage(lease, 1, 1) for lease in units if lease.free < 1 or not is_valid]
        tokens = spend = 0
        if need is not None and bundle.is_metered:
            self._check_request(bundle, need, now_mono)
            wanted = need.within(bundle.tokens_bound, bundle.spend_bound, paid or 0)
            least, most = wanted.tokens_least, wanted.tokens_most
            tokens = self._amount(bundle, bundle.token_leases, short, least=least, most=most, now_mono=now_mono)
            least, most = wanted.spend_least, wanted.spend_most
            spend = self._amount(bundle, bundle.spend_windows, short, least=least, most=most, now_mono=now_mono)
        if short and not self.is_lenient:
            self._refuse_or_request(short, bundle.leases, now_mono)
        return bundle, tokens, spend

    def _check_request(self, bundle: Bundle, need: Need, now_mono: float) -> None:
        """Refuse a request that the plan never allows."""
        if bundle.limits_spend and not need.is_priced:
            raise Refusal(Reason.MODEL_UNPRICED)
        tokens, spend = bundle.tokens_per_request, bundle.spend_per_request
        if tokens is not None and need.tokens_least > tokens.remaining:
            raise refusals.exceeds_limit_per_request(tokens, need.tokens_least, now_mono, bundle.leases)
        if spend is not None and need.spend_least > spend.remaining:
            raise refusals.exceeds_limit_per_request(spend, need.spend_least, now_mono, bundle.leases)

    def _amount(
        self,
        bundle: Bundle,
        leases: Sequence[Lease],
        short: list[LeaseShortage],
        *,
        least: int,
        most: int,
        now_mono: float,
    ) -> int:
        """Return how much to take of these leases, and append those that fall short of it to `short`."""
        is_valid = now_mono < self._sync.valid_until_mono
        amount = most
        for lease in leases if most else ():
            most_here = min(most, lease.limit) if lease.is_rate else most
            free = lease.free if is_valid else -1
            if least > lease.quota:
                if lease.measure in BUDGETS:
                    # A budget that is too small is refused as a spent one: its window never begins again.
                    raise refusals.refusal(lease, least, now_mono, bundle.leases)
                if lease.is_fresh(now_mono):
                    raise refusals.never_fits(lease, least, now_mono, bundle.leases)
                # The ledger may have credited the window since.
                short.append(LeaseShortage(lease, least, 0))
            elif free >= most_here or (free >= least and lease.is_dry(now_mono)):
                amount = min(amount, most_here, free)
            else:
                short.append(LeaseShortage(lease, least, most_here))
        return amount

    def _open(self, lease: Lease) -> None:
        """Report a lease from now on, beginning with the next message: the ledger client may be asleep."""
        self._sync.open_lease(lease)
        self._reviews.make_urgent(lease)

    def _take_units(self, lease: Lease, units: int) -> None:
        if not lease.number:
            # Taken before the first ledger request for it: it may exceed the limit, which is the policy; or nothing is
            # held, and the request may still use more.
            self._open(lease)
        lease.free -= units
        lease.is_overdrawn = lease.is_overdrawn or (self.is_lenient and lease.free < 0)
        if not lease.is_noted:
            self._reviews.note_change(lease)
        if lease.free < lease.low:
            self._reviews.note_low(lease)

    def _refuse_or_request(
        self, short: Sequence[LeaseShortage], leases: Sequence[Lease], now_mono: float, extended: Hold | None = None
    ) -> None:
        """Raise a Refusal if the ledger just refused one of them, else Short. `extended`: the hold that needs them."""
        refused = [need for need in short if need.most and need.lease.is_refused(need.least, now_mono)]
        if refused:
            # The limit with the longest wait: after it, the other limits admit the request too.
            needs = [(need.lease, need.least + _held_of(need.lease, extended)) for need in refused]
            lease, least = max(needs, key=lambda need: refusals.wait_order(need[0], need[1]))
            raise refusals.refusal(lease, least, now_mono, leases)
        raise Short(short)


def _held_of(lease: Lease, extended: Hold | None) -> int:
    """What an extended hold has of a lease: part of what it needs, so that its own reservation does not refuse it."""
    if extended is None or lease.is_rate:
        return 0
    return extended.spend if lease.measure in SPEND else extended.tokens


def _put_back(leases: Sequence[Lease], amount: int) -> None:
    for lease in leases:
        lease.free += amount


def _granted_at(bundle: Bundle) -> float:
    """When the units of the bundle's token rates were granted, at the earliest."""
    return min([lease.granted_at for lease in bundle.token_rates], default=0.0)


def _like(
    hold: Hold, tokens: int, spend: int, *, has_slots: bool | None = None, granted_at: float | None = None
) -> Hold:
    """The same hold with other amounts."""
    return Hold(
        hold.bundle, hold.meters, tokens, spend, earlier=hold.earlier, paid=hold.paid,
        has_slots=hold.has_slots if has_slots is None else has_slots,
        granted_at=hold.granted_at if granted_at is None else granted_at,
    )  # fmt: skip
