"""Background tasks survive unexpected exceptions: these are logged and counted, and the task is restarted."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import pytest

from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance, Bundle, Hold
from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import NEVER, Identity, Missing, Moment, TimeBudget
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.ledger import Ledger
from keyproxy.process.ops_listener import Check, Verdict
from keyproxy.process.store_health import check_ledger, check_reaping
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.background import BackgroundTask
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.change_feed import ChangeFeed
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.ledger.backend import REAP_PORTION
from keyproxy.store.ledger.charge_dedup import Claims, Cover
from keyproxy.store.ledger.ledger import Ledger as StoreLedger
from keyproxy.store.postgres.database import Database, NotificationListener, Row
from keyproxy.store.usage.journal import UsageJournal
from tests.reference_claims import ReferenceClaims
from tests.reference_ledger import ReferenceLedger
from tests.simulation.clockwork import Clock, VirtualLoop

_HOLD = Hold(Bundle(()))
_IDENTITY = Identity("key_1", "u_42", "acme", frozenset(), False, NEVER, None, b"")
_LOOK = {"snapshot": "1:1:", "history": "1", "server_seconds": 1.0, "kind": None, "subject": None}


class Site:
    """A process with virtual time."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = VirtualLoop(self.clock)  # type: ignore[abstract]  # as much of a loop as is needed
        #: How long the monotonic clock has stood still.
        self.stood_still = 0.0

    def now(self) -> Moment:
        return Moment(1_800_000_000.0 + self.clock.now, 5_000.0 + self.clock.now - self.stood_still)

    def do(self, work: Callable[[], object]) -> None:
        """Run in the loop of the process."""
        asyncio._set_running_loop(self.loop)
        try:
            work()
        finally:
            asyncio._set_running_loop(None)

    def wait(self, seconds: float) -> None:
        self.clock.run(self.clock.now + seconds)


class Flaw:
    """A store that, after `skips` successes, fails `times` times for a reason other than an outage."""

    is_down = False
    moves = 0

    def __init__(self, times: int) -> None:
        self.left = times
        self.skips = 0
        self.calls: Counter[str] = Counter()

    async def fetch(self, name: str, *_arguments: object) -> Sequence[Row]:
        self.strike(name)
        return cast("Sequence[Row]", [{**_LOOK, "is_more": False}])

    def strike(self, name: str) -> None:
        self.calls[name] += 1
        if self.skips:
            self.skips -= 1
        elif self.left:
            self.left -= 1
            raise RuntimeError("a defect")


class FlawedListener(NotificationListener):
    """A listener that cannot be opened, for a reason other than an outage."""

    def __init__(self, flaw: Flaw) -> None:
        super().__init__("", "")
        self.flaw = flaw

    async def open(self, notified: Callable[[], None], lost: Callable[[], None]) -> None:
        self.flaw.strike("listen")


class FlawedClaims(ReferenceClaims):
    """A claim store with a flaw."""

    def __init__(self, flaw: Flaw) -> None:
        super().__init__()
        self.flaw = flaw

    async def cover(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, Cover]:
        self.flaw.strike("cover")
        return await super().cover(fingerprints)


class Used:
    """A key that is used."""

    identity, mark_due = _IDENTITY, 0.0


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    assert not site.loop.errors


def feed(site: Site, flaw: Flaw, listener: NotificationListener | None = None) -> ChangeFeed:
    class Cache:
        def distrust_all(self) -> None:
            """Do nothing: nothing is cached."""

    made = ChangeFeed(cast("Database", flaw), listener, cast("IdentityCache", Cache()), FeedState(), site.now)
    site.do(made.start)
    return made


def test_change_feed_is_restarted(site: Site) -> None:
    flaw = Flaw(3)
    followed = feed(site, flaw)
    site.wait(5.0)
    assert followed.is_current()
    assert (followed.lasting.defects, flaw.calls["changes_since"] > 6) == (3, True)


def test_listening_for_notifications_is_restarted(site: Site) -> None:
    flaw = Flaw(2)
    listening = feed(site, Flaw(0), FlawedListener(flaw))
    states = []
    for seconds in (0.1, 20.0):
        site.wait(seconds)
        states.append(listening.is_listening)
    assert states == [False, True]
    assert (listening.lasting.defects, flaw.calls["listen"]) == (2, 3)


def test_recording_uses_of_keys_is_restarted(site: Site) -> None:
    flaw = Flaw(1)
    notes = LastUsed(cast("Database", flaw))
    site.do(notes.start)
    for _ in range(3):
        notes.mark(cast("Any", Used()), site.now())
        site.wait(5.0)
    assert (notes.lasting.defects, flaw.calls["mark_used"]) == (1, 3)


def test_usage_is_written_after_a_defect_and_readiness_has_a_reason_until_then(site: Site) -> None:
    flaw = Flaw(4)
    usage = UsageJournal(cast("Database", flaw), schema.Usage(event_days=0), site.now, settle_seconds=0.5)
    exchange = Exchange()
    exchange.identity, exchange.sent_mono = _IDENTITY, 1.0
    usage.take([(exchange, "any", "live", "ok")])
    site.do(usage.start)
    site.wait(1.0)
    assert usage.down_because == "a defect"
    site.wait(9.0)
    assert usage.down_because == ""
    assert usage.unwritten_seconds() == 0.0
    # One of the four was in the cleanup, which is not retried at once.
    assert (usage.lasting.defects, usage.counts["batches"], flaw.calls["tend_usage"]) == (4, 1, 1)


def test_defect_fails_pending_lookups_of_charges_and_the_next_one_succeeds(
    site: Site,
) -> None:
    flaw = Flaw(1)
    claims = Claims(FlawedClaims(flaw), cast("Ledger", None), schema.LedgerSettings(), site.now)
    site.do(claims.start)
    outcomes: list[object] = []

    async def request() -> None:
        try:
            outcomes.append(await claims.paid(bytes(32), TimeBudget()))
        except Refusal as refusal:
            outcomes.append(refusal.reason)

    for _ in range(2):
        site.do(lambda: site.loop.create_task(request()))
        site.wait(0.01)
        assert claims.down_because == "a defect" or outcomes[-1] is None
        site.wait(2.0)
    assert outcomes == [Reason.LEDGER_UNAVAILABLE, None]
    assert (claims.lasting.defects, claims.down_because) == (1, "")


def test_claims_are_sent_again_although_one_cannot_be_settled(site: Site) -> None:
    flaw = Flaw(1)

    class LeaseTable:
        def release(self, hold: Hold) -> Hold:
            return hold

        def settle(self, _hold: Hold, **_how: object) -> None:
            flaw.strike("settle")

    claims = Claims(ReferenceClaims(), cast("Ledger", LeaseTable()), schema.LedgerSettings(), site.now)
    site.do(claims.start)
    for number in range(3):
        claims.add(_HOLD, bytes([number] * 32), 1, None)
    site.wait(3.0)
    assert (claims.pending, claims.lasting.defects, flaw.calls["settle"]) == (0, 1, 3)


@pytest.mark.parametrize("is_clumsy", [False, True])
def test_defect_is_logged_with_its_traceback_and_passed_to_the_task_which_restarts(
    site: Site, caplog: pytest.LogCaptureFixture, is_clumsy: bool
) -> None:
    flaw, outcomes = Flaw(2), list[Exception]()

    async def work() -> None:
        flaw.strike("work")
        await asyncio.sleep(1_000.0)

    def failed(error: Exception) -> None:
        outcomes.append(error)
        if is_clumsy:
            raise ValueError("and another one")

    lasting = BackgroundTask("something")
    with caplog.at_level(logging.ERROR):
        site.do(lambda: lasting.start(work, failed))
        site.wait(1.5)
        assert flaw.calls["work"] == 2
        site.wait(10.0)
    assert (lasting.defects, flaw.calls["work"]) == (2, 3)
    assert [str(error) for error in outcomes] == ["a defect"] * 2
    logged = [record for record in caplog.records if record.exc_info and record.exc_info[0] is RuntimeError]
    assert len(logged) == 2
    assert "something" in logged[0].getMessage()

    async def end() -> None:
        await lasting.end()
        outcomes.clear()

    ending: list[Awaitable[None]] = []
    site.do(lambda: ending.append(site.loop.create_task(end())))
    site.wait(2_000.0)
    assert not outcomes
    assert flaw.calls["work"] == 3


class FlawedBackend:
    """A ledger that is always available. Implements LedgerBackend."""

    def __init__(self, site: Site, flaw: Flaw) -> None:
        self.reference = ReferenceLedger(
            lambda: site.now().wall_seconds, lease_seconds=schema.LedgerSettings().lease_seconds
        )
        self.flaw = flaw

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        self.flaw.strike("sync")
        return self.reference.sync(holder, serial, lines)

    async def reap(self, portion: int = REAP_PORTION) -> bool:
        del portion
        self.flaw.strike("reap")
        self.reference.reap()
        return False

    async def forget(self, portion: int) -> bool:
        del portion
        return False

    async def end(self, holder: str) -> None:
        self.reference.end(holder)

    async def close(self) -> None:
        """Do nothing: nothing is open."""


class Customers:
    """Users of a ledger, each with a limit of 100 requests per day."""

    def __init__(self, site: Site, flaw: Flaw) -> None:
        self.site = site
        self.backend = FlawedBackend(site, flaw)
        self.ledger = StoreLedger(self.backend, schema.LedgerSettings(), site.now)
        self.holds: list[Hold] = []
        self._allowances: dict[str, Allowance] = {}
        site.do(self.ledger.start)

    async def _take(self, user: str, outcomes: list[Reason | None]) -> None:
        plan = Plan(requests_per_day=100)
        allowance = self._allowances.setdefault(user, Allowance(((Pool("user", user, False), plan),)))
        patience = TimeBudget()
        try:
            while True:
                try:
                    self.holds.append(self.ledger.take(allowance, self.site.now()))
                    break
                except Missing as missing:
                    await missing.fetch_missing(patience)
        except Refusal as refusal:
            outcomes.append(refusal.reason)
        else:
            outcomes.append(None)

    def request(self, *users: str, seconds: float = 0.1) -> list[Reason | None]:
        """The outcomes of concurrent requests after `seconds`: None, or the reason of a refusal."""
        outcomes: list[Reason | None] = []
        for user in users:
            self.site.do(lambda user=user: self.site.loop.create_task(self._take(user, outcomes)))  # type: ignore[misc]
        self.site.wait(seconds)
        return outcomes

    def end(self) -> int:
        """End all requests. Return what is spent of their windows when everything is settled."""
        for hold in self.holds:
            self.ledger.settle(hold, was_sent=True)
        self.site.wait(5.0)
        self.site.do(lambda: self.site.loop.create_task(self.ledger.close()))
        self.site.wait(5.0)
        rows = self.backend.reference.windows.values()
        assert {row.held for row in rows} == {0}
        return sum(row.spent for row in rows)


class Flawed:
    """Replaces a method of the lease table: may fail first, then calls the method."""

    def __init__(self, flaw: Flaw, method: Callable[..., Any]) -> None:
        self.flaw, self.method = flaw, method

    def __call__(self, *args: Any, **how: Any) -> Any:
        self.flaw.strike(self.method.__name__)
        return self.method(*args, **how)


#: Where the client's task can fail: before a message, during it, after its response.
PLACES = ["gather", "lines", "_review", "apply", "sync"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("has_leases", [True, False])
def test_defect_anywhere_in_the_ledger_client_fails_waiting_requests_but_no_later_ones(
    site: Site, place: str, has_leases: bool
) -> None:
    flaw = Flaw(0)
    customers = Customers(site, flaw)
    if has_leases:
        assert customers.request("u_1") == [None]
    site.wait(3.0)
    conversation = customers.ledger.conversation
    if place != "sync":
        setattr(conversation.lease_sync, place, Flawed(flaw, getattr(conversation.lease_sync, place)))
    # Of two lines in one message, one has been built already.
    flaw.left, flaw.skips = 1, int(place == "_review")
    assert customers.request("u_2", "u_3", seconds=0.9) == [Reason.LEDGER_UNAVAILABLE] * 2
    assert flaw.left == 0
    assert conversation.down_because == "a defect"
    site.wait(1.0)
    assert conversation.down_because == ""
    assert customers.request("u_1", "u_2", "u_3") == [None] * 3
    assert conversation.lasting.defects == 1
    assert customers.end() == 3 + has_leases


def test_process_that_is_idle_now_and_then_stays_one_holder_and_needs_one_round_trip(site: Site) -> None:
    customers = Customers(site, Flaw(0))
    counts = customers.ledger.conversation.counts
    for gaps in range(1, 6):
        before = counts["round_trips"]
        assert customers.request("u_1") == [None]
        assert counts["round_trips"] == before + 1
        site.do(lambda: customers.ledger.settle(customers.holds.pop(), was_sent=True))
        site.wait(schema.LedgerSettings().lease_seconds * 5)
        assert customers.ledger.conversation.lease_sync.outstanding == 0
        (holder,) = customers.backend.reference.holders.values()
        assert holder.rests, gaps
    assert customers.end() == 5


@pytest.mark.parametrize("is_still", [True, False])
@pytest.mark.parametrize("users", [[], ["u_2"]])
def test_machine_that_wakes_after_its_holder_was_deleted_is_not_charged_twice(
    site: Site, users: list[str], is_still: bool
) -> None:
    """Its first message has nothing to report: one request has been running for long, and others are new."""
    customers = Customers(site, Flaw(0))
    assert customers.request("u_1") == [None]
    site.wait(5.0)
    reference = customers.backend.reference
    suspended_seconds = 26 * 3_600.0
    site.loop.runs = False
    site.wait(suspended_seconds)
    reference.reap()
    reference.forget(86_400.0)
    assert not reference.holders
    site.stood_still = suspended_seconds if is_still else 0.0
    site.loop.runs = True
    assert customers.request(*users) == [None] * len(users)
    site.wait(5.0)
    assert customers.end() == 1 + len(users)
    assert {holder.has_ended or holder.rests for holder in reference.holders.values()} <= {True}


def test_defect_in_reaping_does_not_end_reaping(site: Site) -> None:
    flaw = Flaw(0)
    customers = Customers(site, flaw)
    flaw.left = 1
    site.wait(20.0)
    assert (flaw.left, flaw.calls["reap"] > 3) == (0, True)
    assert customers.request("u_1") == [None]
    assert customers.end() == 1


def test_readiness_reports_that_dead_holders_are_not_ended_for_three_lease_times(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    flaw = Flaw(0)
    customers = Customers(site, flaw)

    class Parts:
        ledger = customers.ledger

    parts: Any = Parts()
    conversation = customers.ledger.conversation
    site.wait(100.0)
    assert check_reaping(parts) == Check(Verdict.OK)
    assert conversation.reap_age.seconds() <= 10.0
    flaw.left = 10**6
    site.wait(15.0)
    assert check_reaping(parts) == Check(Verdict.OK)
    caplog.clear()
    site.wait(30.0)
    assert check_reaping(parts).verdict is Verdict.DEGRADED
    flaw.left = 0
    site.wait(10.0)
    assert check_reaping(parts) == Check(Verdict.OK)
    logged = [record.getMessage() for record in caplog.records if record.name == "keyproxy.store.ledger.reap_age"]
    assert [text.partition(" for ")[0].partition(",")[0] for text in logged] == [
        "dead holders of leases were not ended", "dead holders of leases are ended again",
    ]  # fmt: skip


def test_readiness_reports_expired_leases_after_missing_responses_but_not_after_idleness(
    site: Site,
) -> None:
    flaw = Flaw(0)
    customers = Customers(site, flaw)
    conversation = customers.ledger.conversation
    usage = UsageJournal(cast("Database", flaw), schema.Usage(), site.now, settle_seconds=0.5)

    class Parts:
        ledger = customers.ledger

    parts: Any = Parts()
    parts.usage = usage
    site.wait(100.0)
    assert check_ledger(parts) == Check(Verdict.OK)
    assert customers.request("u_1") == [None]
    flaw.left = 10**6
    outcomes = []
    for seconds in (4.0, 10.0, 100.0):
        site.wait(seconds)
        outcomes.append(check_ledger(parts))
    assert {check.verdict for check in outcomes} == {Verdict.DEGRADED}
    assert [check.reason.partition(":")[0] for check in outcomes] == [
        "requests use existing leases until they expire",
        "leases have expired",
        "leases have expired",
    ]
    assert conversation.lasting.defects > 50
    flaw.left = 0
    site.wait(3.0)
    assert check_ledger(parts) == Check(Verdict.OK)
    assert customers.request("u_1") == [None]
