"""Metrics of limits, the ledger and usage: what refused, what waits, how far what was spent is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

ROUND_TRIP_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class Spending:
    """Numbers that are asked for at scrape time."""

    #: Requests refused, by policy: a closed set of kind.measure.
    limit_refusals: Callable[[], Mapping[str, int]]
    #: `taken` and `waited`: admissions under limits, and how often one waited for the ledger; `failures` of round-trips.
    ledger_counts: Callable[[], Mapping[str, int]]
    #: `repeats` that were not charged, and claims that were charged `unasked`; how many wait for an answer.
    claim_counts: Callable[[], Mapping[str, int]]
    claims: Callable[[], int]
    leases: Callable[[], int]
    unsettled_seconds: Callable[[], float]
    #: `events` that wait to be written; `requests` and `events` that were dropped; how old what waits may be.
    events_pending: Callable[[], int]
    usage_counts: Callable[[], Mapping[str, int]]
    usage_dropped: Callable[[], Mapping[str, int]]
    unwritten_seconds: Callable[[], float]


def families(spending: Spending) -> Iterator[Metric]:
    """The families, but for the histogram of round-trips."""
    refusals = CounterMetricFamily(
        "keyproxy_limit_refusals", "Requests that a limit refused; nothing was charged.", labels=("policy",)
    )
    for policy, count in spending.limit_refusals().items():
        refusals.add_metric((policy,), count)
    yield refusals
    counts = spending.ledger_counts()
    yield _counter("keyproxy_ledger_admissions", "Requests that took of limits.", counts["taken"])
    yield _counter("keyproxy_ledger_waits", "Times that a request waited for the ledger.", counts["waited"])
    yield _counter("keyproxy_ledger_failures", "Messages to the ledger without an answer.", counts["failures"])
    claimed = spending.claim_counts()
    yield _counter(
        "keyproxy_repeats_not_charged", "Requests with an Idempotency-Key that were charged before, and not again.",
        claimed["repeats"],
    )  # fmt: skip
    yield _counter(
        "keyproxy_claims_unasked", "Requests with an Idempotency-Key charged in full, since nobody could be asked.",
        claimed["unasked"],
    )  # fmt: skip
    yield _gauge("keyproxy_claims_pending", "Requests with an Idempotency-Key to be charged.", spending.claims())
    yield _gauge("keyproxy_ledger_leases", "Leases that this process has.", spending.leases())
    yield _gauge(
        "keyproxy_ledger_unsettled_seconds",
        "For how long something has been spent that the ledger has not confirmed.",
        spending.unsettled_seconds(),
    )
    written = spending.usage_counts()
    yield _counter("keyproxy_usage_batches", "Batches of usage that were written.", written["batches"])
    yield _counter("keyproxy_usage_failures", "Attempts to write usage without an answer.", written["failures"])
    yield _counter("keyproxy_usage_events", "Events of requests that were written.", written["events"])
    dropped = CounterMetricFamily(
        "keyproxy_usage_dropped", "What was not recorded, since too much waited to be written.", labels=("what",)
    )
    for what, count in spending.usage_dropped().items():
        dropped.add_metric((what,), count)
    yield dropped
    yield _gauge(
        "keyproxy_usage_events_pending", "Events of requests that wait to be written.", spending.events_pending()
    )
    yield _gauge(
        "keyproxy_usage_unwritten_seconds", "How old usage may be that is not written yet.",
        spending.unwritten_seconds(),
    )  # fmt: skip


def _counter(name: str, text: str, count: int) -> Metric:
    return CounterMetricFamily(name, text, value=count)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
