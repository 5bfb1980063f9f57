"""Watches ended requests for signals of unusual use of a key: `[anomalies]`.

Requests are examined in batches after they have ended, so no request waits. What a key was used with is compared with
what this process knows to be stored; anything else is passed on, and the store decides whether it is new. Only requests
that were admitted count towards signals that can suspend a key, and only towards those of the key that they presented.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple

from keyproxy.decision.anomalies.key_watch import KeyPace, KeyWatch, Occurrences, StoredHabits
from keyproxy.http.forwarding import Forwarding
from keyproxy.http_messages import RequestHead
from keyproxy.limits.calendar_windows import span
from keyproxy.limits.lease import Lease
from keyproxy.limits.ledger_protocol import KEY_POOL
from keyproxy.model import Identity, Moment
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.signals import (
    BURST,
    FAILURES,
    MANY,
    NEW_MODEL,
    NEW_NETWORK,
    PROBING,
    VELOCITY,
    Habit,
    Signal,
    Signals,
)
from keyproxy.reasons import Reason

#: An exchange with its labels: route, mode, code.
_Row = tuple[Exchange, str, str, str]

#: Keys that are watched, and networks whose failures are counted; the ones that were seen least recently are forgotten.
_KEYS_MAX: Final = 10_000
_NETWORKS_MAX: Final = 1_024
_SETTLED_MAX: Final = 4_096

_HOUR_SECONDS: Final = 3_600.0
_PERIOD_SECONDS: Final = 600.0
_PROBES: Final = 20
_FAILURES: Final = 100

#: Refusals of a key for what it may not do.
_PROBING_REASONS: Final = frozenset(
    {Reason.SCOPE_INSUFFICIENT, Reason.MODEL_NOT_ALLOWED, Reason.TOOL_NOT_ALLOWED, Reason.NAMESPACE_FORBIDDEN}
)

#: The share of a window that is spent at a high velocity, and how much faster than evenly that is.
_SPENT_SHARE: Final = 0.5
_TIMES_EVEN: Final = 4.0

#: How many requests of two days exceed the ones of an hour that would explain a rate of one per minute.
_BASELINE_FACTOR: Final = 6


class WatchTerms(NamedTuple):
    """What is watched: the signals, and the names of the configured models."""

    signals: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()


class Watcher:
    """Watches the ended requests of a process."""

    def __init__(self, now: Callable[[], Moment]) -> None:
        """Watches nothing until `change`."""
        self._now = now
        self._signals = Signals()
        self._keys: dict[str, KeyWatch] = {}
        self._networks: dict[bytes, Occurrences] = {}
        #: Since when no request of a watched key was forgotten.
        self._complete_since = now().mono_seconds
        self._networks_reported: dict[bytes, int] = {}
        self._read(WatchTerms())

    def change(self, terms: WatchTerms, signals: Signals) -> None:
        """Watch under other terms, and report to `signals`."""
        if BURST in terms.signals and not self._watches_bursts:
            self._complete_since = self._now().mono_seconds
        self._signals = signals
        self._read(terms)

    def _read(self, terms: WatchTerms) -> None:
        self.is_watching = bool(terms.signals)
        #: The keys of connections with clients of one address, by model, whose habits are all stored.
        self._settled: dict[tuple[Identity, Forwarding | None, str], KeyWatch] = {}
        self._models: dict[str, bytes] = {}
        if NEW_MODEL in terms.signals:
            self._models = {model: model.encode("utf-8") for model in terms.models}
        self._watches_networks = NEW_NETWORK in terms.signals
        self._watches_velocity = VELOCITY in terms.signals
        self._watches_bursts = BURST in terms.signals
        self._watches_probing = PROBING in terms.signals
        self._watches_failures = FAILURES in terms.signals

    def take(self, rows: Sequence[_Row]) -> None:
        """Examine ended requests. Never waits."""
        now = self._now()
        keys, settled = self._keys, self._settled
        admitted: dict[str, Exchange] = {}
        for row in rows:
            exchange = row[0]
            identity = exchange.identity
            if identity is not None and exchange.permit is not None:
                known = settled.get((identity, exchange.peer, exchange.model))
                if known is not None:
                    known.count += 1
                    admitted[identity.key_id] = exchange
                    continue
            if identity is None:
                if self._watches_failures and exchange.reason is Reason.KEY_INVALID:
                    self._count_failure(exchange, now)
                continue
            if identity.oauth is not None:
                # The store learns the habits of keys only, so that those of a session would be sent with each request.
                continue
            key_id = identity.key_id
            watch = keys.get(key_id) or self._watch(key_id, now.mono_seconds)
            if exchange.permit is None:
                if self._watches_probing and exchange.reason in _PROBING_REASONS:
                    self._count_probe(exchange, key_id, watch, now)
                continue
            watch.count += 1
            admitted[key_id] = exchange
            peer = exchange.peer
            if self._knows_habits(exchange, watch, key_id) and (peer is None or not peer.is_trusted):
                # Further requests of this connection with this key and model show nothing new.
                if len(settled) >= _SETTLED_MAX:
                    settled.clear()
                settled[identity, peer, exchange.model] = watch
        if self._watches_bursts or self._watches_velocity:
            for key_id, exchange in admitted.items():
                examined = keys.get(key_id)
                if examined is not None:
                    self._examine(exchange, key_id, examined, now)

    def _knows_habits(self, exchange: Exchange, watch: KeyWatch, key_id: str) -> bool:
        """Whether what a key was used with is stored. Else learn it."""
        is_known = True
        model = self._models.get(exchange.model)
        if model is not None and model not in watch.models:
            self._learn(exchange, watch.models, key_id, kind=NEW_MODEL, value=model)
            is_known = False
        if self._watches_networks and exchange.peer is not None:
            network = exchange.peer.client(exchange.head).network
            if network and network not in watch.networks and MANY not in watch.networks:
                self._learn(exchange, watch.networks, key_id, kind=NEW_NETWORK, value=network)
                is_known = False
        return is_known

    def _watch(self, key_id: str, now_mono: float) -> KeyWatch:
        if len(self._keys) >= _KEYS_MAX:
            # The first tenth was added first; busy keys are added again at once.
            for old in list(self._keys)[: _KEYS_MAX // 10]:
                del self._keys[old]
            self._complete_since = now_mono
            self._settled.clear()
        watch = self._keys[key_id] = KeyWatch()
        return watch

    def _learn(self, exchange: Exchange, known: StoredHabits, key_id: str, *, kind: str, value: bytes) -> None:
        self._signals.learn(Habit(key_id, kind, value, _client(exchange, exchange.head), known))

    def _examine(self, exchange: Exchange, key_id: str, watch: KeyWatch, now: Moment) -> None:
        """Look at what the requests of a batch add up to."""
        count, watch.count = watch.count, 0
        if self._watches_bursts:
            pace = watch.pace
            if pace is None:
                pace = watch.pace = KeyPace(now.mono_seconds)
            pace.add(count, now.mono_seconds)
            recent = pace.burst(now.mono_seconds)
            if recent and watch.is_first(BURST, "", _hour(now)):
                self._report_burst(exchange, key_id, recent, now)
        hold = None if exchange.permit is None else exchange.permit.hold
        if self._watches_velocity and hold is not None:
            for lease in hold.bundle.leases:
                if _is_fast(lease, now) and watch.is_first(VELOCITY, lease.window.policy, _hour(now)):
                    self._report_velocity(exchange, key_id, lease, now)

    def _report_burst(self, exchange: Exchange, key_id: str, recent: int, now: Moment) -> None:
        # The pace before this process has started is in the records of usage only.
        is_complete = now.mono_seconds - self._complete_since >= _HOUR_SECONDS
        self._signals.report(
            Signal(
                BURST, key_id, "", "", _client(exchange, exchange.head), {"requests_per_minute": recent},
                may_suspend=True, baseline=None if is_complete else _BASELINE_FACTOR * recent + 1,
            )
        )  # fmt: skip

    def _report_velocity(self, exchange: Exchange, key_id: str, lease: Lease, now: Moment) -> None:
        start, end = span(lease.measure, now.wall_seconds)
        observed = {
            "spent_share": round(lease.spent / lease.quota, 3),
            "elapsed_share": round((now.wall_seconds - start) / (end - start), 3),
        }
        self._signals.report(
            Signal(
                VELOCITY, key_id, "", lease.window.policy, _client(exchange, exchange.head), observed,
                may_suspend=lease.pool.kind == KEY_POOL, shared_since=float(start),
            )
        )  # fmt: skip

    def _count_probe(self, exchange: Exchange, key_id: str, watch: KeyWatch, now: Moment) -> None:
        if watch.probes is None:
            watch.probes = Occurrences(_PROBES, _PERIOD_SECONDS)
        if watch.probes.add(now.mono_seconds) and watch.is_first(PROBING, "", _hour(now)):
            client = _client(exchange, exchange.head)
            self._signals.report(Signal(PROBING, key_id, "", "", client, {"refusals": _PROBES}))

    def _count_failure(self, exchange: Exchange, now: Moment) -> None:
        network = b"" if exchange.peer is None else exchange.peer.client(exchange.head).network
        if not network:
            return
        # Moved to the end: the first one was seen least recently.
        failures = self._networks.pop(network, None) or Occurrences(_FAILURES, _PERIOD_SECONDS)
        if len(self._networks) >= _NETWORKS_MAX:
            del self._networks[next(iter(self._networks))]
        self._networks[network] = failures
        if failures.add(now.mono_seconds) and self._networks_reported.get(network) != _hour(now):
            if len(self._networks_reported) >= _NETWORKS_MAX:
                self._networks_reported.clear()
            self._networks_reported[network] = _hour(now)
            client = _client(exchange, exchange.head)
            self._signals.report(Signal(FAILURES, None, network.decode("ascii"), "", client, {"failures": _FAILURES}))

    def sizes(self) -> dict[str, int]:
        """How many keys and networks are watched."""
        return {"keys": len(self._keys), "networks": len(self._networks)}


def terms_of(watch: Collection[str], models: Collection[str]) -> WatchTerms:
    """The terms by a configuration."""
    return WatchTerms(frozenset(watch), frozenset(models))


def _hour(now: Moment) -> int:
    return int(now.wall_seconds // _HOUR_SECONDS)


def _client(exchange: Exchange, head: RequestHead | None) -> str | None:
    recorded = b"" if exchange.peer is None else exchange.peer.recorded_address(head)
    return recorded.decode("ascii") if recorded else None


def _is_fast(lease: Lease, now: Moment) -> bool:
    """Whether much of a window is spent early, by all proxies together as of the ledger's last reply."""
    quota = lease.quota
    if lease.is_rate or quota <= 0 or not lease.is_current or now.mono_seconds >= lease.ends_mono:
        return False
    share = lease.spent / quota
    if share < _SPENT_SHARE:
        return False
    start, end = span(lease.measure, now.wall_seconds)
    # A total has no end, of which no share has elapsed.
    return start > 0 and share * (end - start) >= _TIMES_EVEN * (now.wall_seconds - start)
