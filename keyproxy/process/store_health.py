"""The readiness checks of a store, and its counters across a reload."""

from __future__ import annotations

from collections.abc import Iterable

from keyproxy.process.ops_listener import Check, Verdict
from keyproxy.store.housekeeping import Chore
from keyproxy.store.store import Store


def carry_over(before: Store, after: Store) -> None:
    """Carry the counters over to the new store, so that metrics never decrease."""
    after.identities.counts = before.identities.counts
    after.owned_ids.counts = before.owned_ids.counts
    after.ledger.counts, after.ledger.refusals = before.ledger.counts, before.ledger.refusals
    was, now = before.ledger.conversation, after.ledger.conversation
    now.counts, now.observe = was.counts, was.observe
    after.claims.counts = before.claims.counts
    after.usage.counts, after.usage.dropped = before.usage.counts, before.usage.dropped
    after.approvals.continue_from(before.approvals)
    after.signals.reported = before.signals.reported
    after.signals.dropped, after.signals.withheld = before.signals.dropped, before.signals.withheld
    after.signing_keys.rejected = before.signing_keys.rejected
    for old, new in zip(before.lasting, after.lasting, strict=True):
        new.defects += old.defects
    for done, to_do in zip(before.chores, after.chores, strict=True):
        to_do.failures += done.failures


def check_ledger(store: Store) -> Check:
    """Whether the ledger responds and usage can be written. Never makes the proxy unready: leases bridge an outage."""
    conversation = store.ledger.conversation
    if conversation.down_because or conversation.has_lapsed:
        why = "leases have expired" if conversation.has_lapsed else "requests use existing leases until they expire"
        return Check(Verdict.DEGRADED, f"{why}: {conversation.down_because or 'no response from the ledger'}")
    if conversation.reaping.failing_because:
        why = conversation.reaping.failing_because
        return Check(Verdict.DEGRADED, f"cannot {conversation.reaping.what}, the units stay reserved: {why}")
    if store.usage.down_because:
        return Check(Verdict.DEGRADED, f"usage not written yet: {store.usage.down_because}")
    return Check(Verdict.OK)


def check_reaping(store: Store) -> Check:
    """Whether dead holders are ended in time. Never makes the proxy unready: only their units stay reserved."""
    age = store.ledger.conversation.reap_age
    if age.is_late:
        return Check(Verdict.DEGRADED, f"dead holders not ended for {age.seconds():.0f} s: units stay reserved")
    return Check(Verdict.OK)


def check_housekeeping(store: Store) -> Check:
    """Whether old rows are deleted. Growing tables do not affect requests yet, so this never makes the proxy unready."""
    # `check_ledger` already reports this one.
    return check_chores([chore for chore in store.chores if chore is not store.ledger.conversation.reaping])


def check_chores(chores: Iterable[Chore]) -> Check:
    """Whether these kinds of cleanup succeed. Never makes a process unready."""
    failing = [f"cannot {chore.what}: {chore.failing_because}" for chore in chores if chore.failing_because]
    return Check(Verdict.DEGRADED, "; ".join(failing)) if failing else Check(Verdict.OK)
