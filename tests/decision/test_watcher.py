"""The watcher notices what a key does not usually do, from requests that ended, and nothing from those of other keys."""

from __future__ import annotations

import dataclasses
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest

from keyproxy.config.tools.anomaly_settings import SIGNALS
from keyproxy.decision.anomalies.key_watch import KeyPace, KeyWatch, Occurrences
from keyproxy.decision.anomalies.watcher import Watcher, terms_of
from keyproxy.http.forwarding import FULL, NONE, TrustRule
from keyproxy.limits.allowance import Allowance
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import Grant, Identity, OAuthSession, Permit, Route
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.signals import MANY, Habit, Signal, Signals
from keyproxy.reasons import Reason
from tests import fakes
from tests.metrics.test_access_log import head_of
from tests.store.harness import Clock

ROUTE = Route("POST /a")
DAY_START = 1_800_000_000 // 86_400 * 86_400


class FakeSignals(Signals):
    """Keeps what it receives."""

    def __init__(self) -> None:
        self.habits: list[Habit] = []
        self.signals: list[Signal] = []

    def learn(self, habit: Habit) -> None:
        self.habits.append(habit)

    def report(self, signal: Signal) -> None:
        self.signals.append(signal)

    def kinds(self) -> list[str]:
        """The kinds of the signals."""
        return [signal.kind for signal in self.signals]


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.wall_seconds = float(DAY_START)
    return clock


@pytest.fixture
def signals() -> FakeSignals:
    return FakeSignals()


@pytest.fixture
def watcher(clock: Clock, signals: FakeSignals) -> Watcher:
    """A watcher of all signals, with two configured models."""
    watcher = Watcher(clock)
    watcher.change(terms_of(SIGNALS, ["gpt-4o", "o3"]), signals)
    return watcher


WHO = fakes.identity()
OTHER = fakes.identity("u_7")


def ended(
    who: Identity | None = WHO, *, reason: Reason | None = None, model: str = "", address: str = "198.51.100.7",
    permit: Permit | None = None, recorded: str = FULL,
) -> tuple[Exchange, str, str, str]:  # fmt: skip
    """An exchange that ended; it was admitted unless it has a reason."""
    one = Exchange()
    one.identity, one.reason, one.model = who, reason, model
    one.peer = TrustRule([], recorded=recorded).forwarding(address, is_tls=False)
    if permit is not None:
        one.permit = permit
    elif reason is None and who is not None:
        one.permit = Permit(Grant(who, ROUTE))
    return one, "r", "live", "ok"


def values(signals: FakeSignals) -> list[tuple[str, str, bytes]]:
    """The habits to learn."""
    return [(habit.key_id, habit.kind, habit.value) for habit in signals.habits]


def test_models_and_networks_of_admitted_requests_are_learned_until_they_are_known(
    watcher: Watcher, signals: FakeSignals
) -> None:
    watcher.take([ended(model="gpt-4o")])
    network = ("key_of_u_42", "new_network", b"198.51.100.0/24")
    assert values(signals) == [("key_of_u_42", "new_model", b"gpt-4o"), network]
    for habit in signals.habits:
        habit.known.add(habit.value)
    watcher.take([ended(model="gpt-4o", address="198.51.100.200"), ended(model="not configured")])
    assert len(signals.habits) == 2
    watcher.take([ended(OTHER)])
    assert values(signals)[2:] == [("key_of_u_7", "new_network", b"198.51.100.0/24")]


def test_sessions_of_oauth_have_no_habits_and_raise_no_signals(watcher: Watcher, signals: FakeSignals) -> None:
    session = dataclasses.replace(WHO, key_id="ses_1", oauth=OAuthSession("gra_1", "cli_1"))
    for _ in range(2):
        watcher.take([ended(session, model="gpt-4o")] * 1_000)
        watcher.take([ended(session, reason=Reason.SCOPE_INSUFFICIENT)] * 100)
    assert (signals.habits, signals.signals) == ([], [])


def test_networks_of_a_key_with_many_are_not_learned(watcher: Watcher, signals: FakeSignals) -> None:
    watcher.take([ended()])
    signals.habits[0].known.add(MANY)
    watcher.take([ended(address="192.0.2.1"), ended(model="o3")])
    assert [kind for _, kind, _ in values(signals)] == ["new_network", "new_model"]


def test_model_named_many_stops_no_network_from_being_learned(watcher: Watcher, signals: FakeSignals) -> None:
    watcher.change(terms_of(SIGNALS, ["many"]), signals)
    watcher.take([ended(model="many")])
    for habit in signals.habits:
        habit.known.add(habit.value)
    watcher.take([ended(model="many", address="192.0.2.1")])
    assert values(signals)[2:] == [("key_of_u_42", "new_network", b"192.0.2.0/24")]


def test_watched_key_takes_at_most_4_kib() -> None:
    def watched(number: int) -> KeyWatch:
        watch = KeyWatch()
        for habit in range(32):
            watch.networks.add(b"2001:db8:%x%02x::/48" % (number, habit))
            watch.models.add(b"model-%d" % habit)
        watch.pace, watch.probes = KeyPace(0.0), Occurrences(20, 600.0)
        for value in range(100):
            watch.is_first("velocity", f"tokens/day {number} {value}", 500_000 + number)
        return watch

    watched(0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = [watched(number) for number in range(100)]
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown / len(kept) <= 4_096


@pytest.mark.parametrize("reason", [Reason.QUOTA_EXHAUSTED, Reason.SCOPE_INSUFFICIENT, Reason.KEY_SUSPENDED])
def test_habits_are_not_learned_from_refused_requests(watcher: Watcher, signals: FakeSignals, reason: Reason) -> None:
    watcher.take([ended(reason=reason, model="gpt-4o")] * 1_000)
    assert (signals.habits, set(signals.kinds()) - {"probing"}) == ([], set())


def test_addresses_that_may_not_be_recorded_are_not_watched(watcher: Watcher, signals: FakeSignals) -> None:
    watcher.take([ended(recorded=NONE)])
    watcher.take([ended(None, reason=Reason.KEY_INVALID, recorded=NONE)] * 200)
    assert (signals.habits, signals.signals) == ([], [])


# -- refusals


@pytest.mark.parametrize(
    "reason",
    [Reason.SCOPE_INSUFFICIENT, Reason.MODEL_NOT_ALLOWED, Reason.TOOL_NOT_ALLOWED, Reason.NAMESPACE_FORBIDDEN],
)
def test_twenty_refusals_in_ten_minutes_are_probing(
    watcher: Watcher, signals: FakeSignals, clock: Clock, reason: Reason
) -> None:
    watcher.take([ended(reason=reason)] * 19)
    watcher.take([ended(OTHER, reason=reason)] * 19)
    clock.advance(600.1)
    watcher.take([ended(reason=reason)] * 19)
    assert signals.signals == []
    watcher.take([ended(reason=reason)])
    (signal,) = signals.signals
    assert (signal.kind, signal.key_id, signal.may_suspend) == ("probing", "key_of_u_42", False)


def test_hundred_invalid_keys_from_a_network_in_ten_minutes_are_failures(
    watcher: Watcher, signals: FakeSignals, clock: Clock
) -> None:
    invalid = ended(None, reason=Reason.KEY_INVALID)
    watcher.take([invalid] * 99)
    watcher.take([ended(None, reason=Reason.KEY_MISSING)] * 99)
    watcher.take([ended(None, reason=Reason.KEY_INVALID, address="192.0.2.1")] * 99)
    assert signals.signals == []
    watcher.take([ended(None, reason=Reason.KEY_INVALID, address="198.51.100.9")])
    (signal,) = signals.signals
    assert (signal.kind, signal.key_id, signal.network) == ("failures", None, "198.51.100.0/24")
    watcher.take([invalid] * 300)
    assert len(signals.signals) == 1, "once an hour"
    clock.advance(3_600)
    watcher.take([invalid] * 100)
    assert len(signals.signals) == 2


def test_watched_keys_and_networks_are_bounded(watcher: Watcher) -> None:
    for number in range(2_000):
        address = f"10.{number // 250}.{number % 250}.1"
        watcher.take([ended(None, reason=Reason.KEY_INVALID, address=address)])
    for number in range(11_000):
        watcher.take([ended(replace(WHO, key_id=f"key_{number}"))])
    sizes = watcher.sizes()
    assert sizes["networks"] == 1_024
    assert 9_000 <= sizes["keys"] <= 10_000


# -- bursts


def test_burst_is_ten_times_the_pace_of_the_hour_and_more_than_sixty_in_a_minute(
    watcher: Watcher, signals: FakeSignals, clock: Clock
) -> None:
    for _ in range(60):
        watcher.take([ended()] * 4)
        clock.advance(60)
    watcher.take([ended()] * 55)
    clock.advance(1)
    watcher.take([ended()])
    assert signals.kinds() == []
    watcher.take([ended()] * 10)
    (signal,) = signals.signals
    assert (signal.kind, signal.key_id, signal.may_suspend, signal.baseline) == ("burst", "key_of_u_42", True, None)
    assert signal.observed == {"requests_per_minute": 68}


def test_steady_pace_is_no_burst_however_high(watcher: Watcher, signals: FakeSignals, clock: Clock) -> None:
    for _ in range(3_600):
        watcher.take([ended()] * 20)
        clock.advance(1)
    first = [signal for signal in signals.signals if signal.baseline is None]
    assert first == []


def test_burst_of_a_process_that_is_younger_than_an_hour_depends_on_recorded_usage(
    watcher: Watcher, signals: FakeSignals, clock: Clock
) -> None:
    clock.advance(10)
    watcher.take([ended()] * 100)
    (signal,) = signals.signals
    assert (signal.kind, signal.baseline) == ("burst", 6 * 100 + 1)


# -- velocity


def _permit(kind: str, plan: Plan, spent: int, clock: Clock) -> Permit:
    """A permit under one limit of which so much is spent."""
    allowance = Allowance(((Pool(kind, "key_of_u_42", False), plan),))
    ledger = fakes.FakeLedger()
    hold = ledger.take(allowance, clock())
    (lease,) = hold.bundle.leases
    lease.spent_apart, lease.used, lease.ends_mono = spent, 0, clock.mono_seconds + 86_400
    return Permit(Grant(WHO, ROUTE), hold)


@pytest.mark.parametrize(
    ("spent", "elapsed_share", "is_fast"),
    [
        (49, 0.0, False), (50, 0.0, True), (50, 0.125, True), (50, 0.126, False), (100, 0.25, True), (100, 0.26, False),
    ],
)  # fmt: skip
def test_velocity_is_half_of_a_window_spent_four_times_as_fast_as_evenly(
    watcher: Watcher, signals: FakeSignals, clock: Clock, spent: int, elapsed_share: float, *, is_fast: bool
) -> None:
    clock.advance(elapsed_share * 86_400)
    watcher.take([ended(permit=_permit("key", Plan(requests_per_day=100), spent, clock))])
    assert signals.kinds() == (["velocity"] if is_fast else [])


@pytest.mark.parametrize(("kind", "may_suspend"), [("key", True), ("user", False), ("tenant", False), ("agent", False)])
def test_velocity_may_suspend_a_key_for_its_own_limit_only(
    watcher: Watcher, signals: FakeSignals, clock: Clock, kind: str, *, may_suspend: bool
) -> None:
    watcher.take([ended(permit=_permit(kind, Plan(requests_per_day=100), 80, clock))] * 3)
    (signal,) = signals.signals
    found: dict[str, Any] = {"value": signal.value, "may": signal.may_suspend, "since": signal.shared_since}
    assert found == {"value": f"{kind}.requests_per_day", "may": may_suspend, "since": float(DAY_START)}


def test_every_client_behind_a_trusted_proxy_is_watched(watcher: Watcher, signals: FakeSignals) -> None:
    peer = TrustRule(["10.0.0.1"]).forwarding("10.0.0.1", is_tls=False)
    for number in (1, 1, 2):
        row = ended()
        row[0].peer, row[0].head = peer, head_of(f"X-Forwarded-For: 198.51.{number}.7")
        watcher.take([row])
        for habit in signals.habits:
            habit.known.add(habit.value)
    assert [value for _, _, value in values(signals)] == [b"198.51.1.0/24", b"198.51.2.0/24"]
