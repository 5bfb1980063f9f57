"""Metrics of limits, the ledger and usage: refusals, backlogs, and the age of unconfirmed charges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

ROUND_TRIP_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class Spending:
    """Values that are read at scrape time."""

    #: Requests refused by a limit, by policy: a closed set of kind.measure.
    limit_refusals: Callable[[], Mapping[str, int]]
    #: `taken`: admissions under limits; `waited`: waits for the ledger; `failures`: failed round trips.
    ledger_counts: Callable[[], Mapping[str, int]]
    #: `repeats`: retries that were not charged again; `unasked`: claims charged without a lookup. `claims`: pending ones.
    claim_counts: Callable[[], Mapping[str, int]]
    claims: Callable[[], int]
    leases: Callable[[], int]
    unsettled_seconds: Callable[[], float]
    #: Pending events; written and failed batches; dropped `requests` and `events`; the age of the oldest unwritten usage.
    events_pending: Callable[[], int]
    usage_counts: Callable[[], Mapping[str, int]]
    usage_dropped: Callable[[], Mapping[str, int]]
    unwritten_seconds: Callable[[], float]


def families(spending: Spending) -> Iterator[Metric]:
    """The metric families, except for the histogram of round trips."""
    refusals = CounterMetricFamily(
        "keyproxy_limit_refusals", "Requests refused because they exceed a limit; not charged.", labels=("policy",)
    )
    for policy, count in spending.limit_refusals().items():
        refusals.add_metric((policy,), count)
    yield refusals
    counts = spending.ledger_counts()
    yield _counter("keyproxy_ledger_admissions", "Requests admitted under limits.", counts["taken"])
    yield _counter("keyproxy_ledger_waits", "Times that a request waited for the ledger.", counts["waited"])
    yield _counter("keyproxy_ledger_failures", "Messages to the ledger that failed or timed out.", counts["failures"])
    claimed = spending.claim_counts()
    yield _counter(
        "keyproxy_repeats_not_charged", "Requests with an Idempotency-Key that had been charged before.",
        claimed["repeats"],
    )  # fmt: skip
    yield _counter(
        "keyproxy_claims_unasked", "Requests with an Idempotency-Key charged in full, because the lookup failed.",
        claimed["unasked"],
    )  # fmt: skip
    yield _gauge(
        "keyproxy_claims_pending", "Requests with an Idempotency-Key that are not charged yet.", spending.claims()
    )
    yield _gauge("keyproxy_ledger_leases", "Leases held by this process.", spending.leases())
    yield _gauge(
        "keyproxy_ledger_unsettled_seconds",
        "Age of the oldest charge that the ledger has not confirmed.",
        spending.unsettled_seconds(),
    )
    written = spending.usage_counts()
    yield _counter("keyproxy_usage_batches", "Batches of usage written.", written["batches"])
    yield _counter("keyproxy_usage_failures", "Failed attempts to write usage.", written["failures"])
    yield _counter("keyproxy_usage_events", "Request events written.", written["events"])
    dropped = CounterMetricFamily(
        "keyproxy_usage_dropped", "Usage that was dropped because the backlog was full.", labels=("what",)
    )
    for what, count in spending.usage_dropped().items():
        dropped.add_metric((what,), count)
    yield dropped
    yield _gauge("keyproxy_usage_events_pending", "Request events that are not written yet.", spending.events_pending())
    yield _gauge(
        "keyproxy_usage_unwritten_seconds", "Age of the oldest usage that is not written yet.",
        spending.unwritten_seconds(),
    )  # fmt: skip


def _counter(name: str, text: str, count: int) -> Metric:
    return CounterMetricFamily(name, text, value=count)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
