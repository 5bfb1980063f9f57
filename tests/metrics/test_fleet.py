"""The metrics of several processes on one page."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from keyproxy.metrics.exposition import Catalogue
from keyproxy.metrics.fleet import Fleet
from keyproxy.process.proxy_metrics import PROXY_METRICS, SUPERVISOR_METRICS, Workers

PAGE = """\
# TYPE keyproxy_requests_total counter
keyproxy_requests_total{{route="any",status="200"}} {requests}
# TYPE keyproxy_request_seconds histogram
keyproxy_request_seconds_bucket{{le="0.1"}} {requests}
keyproxy_request_seconds_bucket{{le="+Inf"}} {requests}
keyproxy_request_seconds_count {requests}
keyproxy_request_seconds_sum 0.5
# TYPE keyproxy_open_requests gauge
keyproxy_open_requests {open}
# TYPE keyproxy_store_up gauge
keyproxy_store_up {up}
# TYPE keyproxy_change_feed_lag_seconds gauge
keyproxy_change_feed_lag_seconds {lag}
# TYPE keyproxy_ledger_unsettled_seconds gauge
keyproxy_ledger_unsettled_seconds {lag}
# TYPE keyproxy_limit_refusals_total counter
keyproxy_limit_refusals_total{{policy="user.rate"}} {requests}
"""


def page(requests: int, *, going: int = 0, up: int = 1, lag: float = 0.0) -> str:
    """The page of one worker."""
    return PAGE.format(requests=requests, open=going, up=up, lag=lag)


def values(text: bytes) -> dict[str, float]:
    """Every series of a page by its name."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if "le" not in sample.labels and "state" not in sample.labels
    }


def fleet() -> Fleet:
    """A fleet of two workers, one of them restarted."""
    return Fleet(PROXY_METRICS, Catalogue(SUPERVISOR_METRICS, lambda: Workers({"ready": 2}, 1)))


def test_counters_are_summed_and_states_show_the_worst() -> None:
    found = values(fleet().render([page(3, going=1, lag=0.5), page(4, going=2, up=0, lag=0.25)]))
    assert found["keyproxy_requests_total"] == 7
    assert found["keyproxy_request_seconds_count"] == 7
    assert found["keyproxy_request_seconds_sum"] == 1.0
    assert found["keyproxy_open_requests"] == 3
    assert found["keyproxy_store_up"] == 0
    assert found["keyproxy_change_feed_lag_seconds"] == 0.5
    assert found["keyproxy_ledger_unsettled_seconds"] == 0.5
    assert found["keyproxy_limit_refusals_total"] == 7
    assert found["keyproxy_worker_restarts_total"] == 1


def test_counters_of_an_exited_worker_stay_and_its_gauges_go() -> None:
    several = fleet()
    several.ended(page(5, going=9))
    several.ended(page(6, going=9))
    for _ in range(2):
        found = values(several.render([page(1, going=1)]))
        assert (found["keyproxy_requests_total"], found["keyproxy_open_requests"]) == (12, 1)


def test_counters_are_exported_even_without_workers() -> None:
    several = fleet()
    several.ended(page(5))
    assert values(several.render([]))["keyproxy_requests_total"] == 5
