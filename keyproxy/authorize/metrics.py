"""The metrics of an authorization server, one row each. Counters are per process.

A new metric is one row here and one in docs/metrics.md; a test compares the two. See `metrics.metric` for the columns.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from keyproxy.metrics.exposition import BUILD_INFO
from keyproxy.metrics.metric import Combine, Metric, MetricKind
from keyproxy.metrics.recorder import Histogram
from keyproxy.oauth.client import ClientKind

#: The grants by which tokens are issued.
GRANTS: Final = ("authorization_code", "refresh_token", "client_credentials")

#: Why sessions end.
REUSE: Final = "reuse"
REPLAY: Final = "replay"
REVOKED: Final = "revoked"
EXPIRED: Final = "expired"
DISABLED: Final = "disabled"
ENDINGS: Final = (REUSE, REPLAY, REVOKED, EXPIRED, DISABLED)

#: The outcomes of fetches of documents and key sets.
FETCHES: Final = ("ok", "refused", "unavailable")

#: The outcome of a request without an error.
OK: Final = "ok"
#: The label of a request for a path that does not exist.
NO_ENDPOINT: Final = "none"

_LOGIN_BOUNDS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class OAuthCounts:
    """What an authorization server counts. All label values are from closed sets."""

    def __init__(self) -> None:
        #: By endpoint and outcome.
        self.requests: Counter[tuple[str, ...]] = Counter()
        self.tokens_issued: Counter[str] = Counter(dict.fromkeys(GRANTS, 0))
        self.sessions_ended: Counter[str] = Counter(dict.fromkeys(ENDINGS, 0))
        self.document_fetches: Counter[str] = Counter(dict.fromkeys(FETCHES, 0))
        #: The time that a login needs at the identity provider or, with a key, in the store.
        self.login_seconds = Histogram(_LOGIN_BOUNDS)
        #: Clients that were stored for the first time.
        self.clients: Counter[str] = Counter({kind.value: 0 for kind in ClientKind})
        #: Whether the last request to the store succeeded.
        self.is_store_up = True


COUNTER, GAUGE, HISTOGRAM = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM
SUM, MIN = Combine.SUM, Combine.MIN

AUTHORIZE_METRICS: Final[tuple[Metric[OAuthCounts], ...]] = (
    Metric("keyproxy_oauth_requests_total", COUNTER, "Requests to the authorization server that have ended.",
           ("endpoint", "outcome"), lambda counts: counts.requests, SUM),
    Metric("keyproxy_oauth_tokens_issued_total", COUNTER, "Access tokens issued, by grant.",
           ("grant",), lambda counts: counts.tokens_issued, SUM),
    Metric("keyproxy_oauth_sessions_ended_total", COUNTER, "Sessions that this process has ended, by reason.",
           ("why",), lambda counts: counts.sessions_ended, SUM),
    Metric("keyproxy_oauth_document_fetches_total", COUNTER, "Fetches of client metadata documents, by outcome.",
           ("outcome",), lambda counts: counts.document_fetches, SUM),
    Metric("keyproxy_oauth_login_seconds", HISTOGRAM, "Time that a login takes, without that of the user.",
           (), lambda counts: counts.login_seconds, SUM),
    Metric("keyproxy_oauth_clients_total", COUNTER, "Clients that were stored for the first time, by kind.",
           ("kind",), lambda counts: counts.clients, SUM),
    Metric("keyproxy_store_up", GAUGE, "Whether the last request to the store succeeded.",
           (), lambda counts: counts.is_store_up, MIN),
    BUILD_INFO,
)  # fmt: skip
