"""The metrics and readiness checks of a store: connects the store to metrics and ops listener."""

from __future__ import annotations

from collections.abc import Callable

from keyproxy.metrics.spending import Spending
from keyproxy.process.ops_listener import Check, Verdict
from keyproxy.store.store import Store


def spending_of(store: Callable[[], Store]) -> Spending:
    """The figures of limits, ledger and usage, read from the store in use at the time of the scrape."""
    return Spending(
        limit_refusals=lambda: store().ledger.refusals,
        ledger_counts=lambda: {**store().ledger.counts.by_name(), **store().ledger.conversation.counts},
        claim_counts=lambda: store().claims.counts,
        claims=lambda: store().claims.pending,
        leases=lambda: store().ledger.conversation.lease_sync.outstanding,
        unsettled_seconds=lambda: store().ledger.conversation.unsettled_seconds(),  # noqa: PLW0108
        events_pending=lambda: store().usage.pending_events,
        usage_counts=lambda: store().usage.counts,
        usage_dropped=lambda: store().usage.dropped,
        unwritten_seconds=lambda: store().usage.unwritten_seconds(),  # noqa: PLW0108
    )


def carry_over(before: Store, after: Store) -> None:
    """Carry the counters over to the new store, so that metrics never decrease."""
    after.identities.counts = before.identities.counts
    after.ledger.counts, after.ledger.refusals = before.ledger.counts, before.ledger.refusals
    was, now = before.ledger.conversation, after.ledger.conversation
    now.counts, now.observe = was.counts, was.observe
    after.claims.counts = before.claims.counts
    after.usage.counts, after.usage.dropped = before.usage.counts, before.usage.dropped
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


def check_housekeeping(store: Store) -> Check:
    """Whether old rows are deleted. Growing tables do not affect requests yet, so this never makes the proxy unready."""
    # `check_ledger` already reports this one.
    chores = [chore for chore in store.chores if chore is not store.ledger.conversation.reaping]
    failing = [f"cannot {chore.what}: {chore.failing_because}" for chore in chores if chore.failing_because]
    return Check(Verdict.DEGRADED, "; ".join(failing)) if failing else Check(Verdict.OK)
