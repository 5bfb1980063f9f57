"""Work in the background outlives what nobody has foreseen: it is logged, counted, and done again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import pytest

from keyproxy import settings
from keyproxy.limits.allowance import Bundle, Hold
from keyproxy.model import NEVER, Identity, Moment, Patience
from keyproxy.ports import Exchange, Ledger
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.claims import Claims
from keyproxy.store.database import Database, Listener, Row
from keyproxy.store.feed import ChangeFeed
from keyproxy.store.identities import FeedState, IdentityCache
from keyproxy.store.last_used import LastUsed
from keyproxy.store.lasting import Lasting
from keyproxy.store.usage import UsageJournal
from tests.reference_claims import ReferenceClaims
from tests.simulation.clockwork import Clock, VirtualLoop

_HOLD = Hold(Bundle(()), (), 0)
_IDENTITY = Identity("key_1", "u_42", "acme", frozenset(), False, NEVER, None, b"")
_LOOK = {"snapshot": "1:1:", "history": 1, "kind": None, "subject": None}


class Site:
    """A process whose time is virtual."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = VirtualLoop(self.clock)  # type: ignore[abstract]  # as much of a loop as is needed

    def now(self) -> Moment:
        return Moment(1_800_000_000.0 + self.clock.now, 5_000.0 + self.clock.now)

    def do(self, work: Callable[[], object]) -> None:
        """In the loop of the process."""
        asyncio._set_running_loop(self.loop)
        try:
            work()
        finally:
            asyncio._set_running_loop(None)

    def wait(self, seconds: float) -> None:
        self.clock.run(self.clock.now + seconds)


class Flaw:
    """What answers, and what fails `times` times of something that is no outage."""

    is_down = False

    def __init__(self, times: int) -> None:
        self.left = times
        self.asked: Counter[str] = Counter()

    async def fetch(self, name: str, *_arguments: object) -> Sequence[Row]:
        self.strike(name)
        return cast("Sequence[Row]", [{**_LOOK, "is_more": False}])

    def strike(self, name: str) -> None:
        self.asked[name] += 1
        if self.left:
            self.left -= 1
            raise RuntimeError("a defect")


class FlawedListener(Listener):
    """One that cannot be opened, for a reason that is no outage."""

    def __init__(self, flaw: Flaw) -> None:
        super().__init__("", "")
        self.flaw = flaw

    async def open(self, heard: Callable[[], None], lost: Callable[[], None]) -> None:
        self.flaw.strike("listen")


class FlawedClaims(ReferenceClaims):
    """A store of claims with a flaw."""

    def __init__(self, flaw: Flaw) -> None:
        super().__init__()
        self.flaw = flaw

    async def charged(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, int]:
        self.flaw.strike("charged")
        return await super().charged(fingerprints)


class Used:
    """A key that is used."""

    identity, mark_due = _IDENTITY, 0.0


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    assert not site.loop.errors


def feed(site: Site, flaw: Flaw, listener: Listener | None = None) -> ChangeFeed:
    class Cache:
        def distrust_all(self) -> None:
            """Nothing is cached."""

    made = ChangeFeed(cast("Database", flaw), listener, cast("IdentityCache", Cache()), FeedState(), site.now)
    site.do(made.start)
    return made


def test_the_change_feed_is_followed_again(site: Site) -> None:
    flaw = Flaw(3)
    followed = feed(site, flaw)
    site.wait(5.0)
    assert followed.is_current()
    assert (followed.lasting.defects, flaw.asked["changes_since"] > 6) == (3, True)


def test_notifications_are_listened_for_again(site: Site) -> None:
    flaw = Flaw(2)
    listening = feed(site, Flaw(0), FlawedListener(flaw))
    heard = []
    for seconds in (0.1, 20.0):
        site.wait(seconds)
        heard.append(listening.is_listening)
    assert heard == [False, True]
    assert (listening.lasting.defects, flaw.asked["listen"]) == (2, 3)


def test_uses_of_keys_are_noted_again(site: Site) -> None:
    flaw = Flaw(1)
    notes = LastUsed(cast("Database", flaw))
    site.do(notes.start)
    for _ in range(3):
        notes.mark(cast("Any", Used()), site.now())
        site.wait(5.0)
    assert (notes.lasting.defects, flaw.asked["mark_used"]) == (1, 3)


def test_usage_is_written_all_the_same_and_readiness_has_a_reason_until_then(site: Site) -> None:
    flaw = Flaw(4)
    usage = UsageJournal(cast("Database", flaw), settings.Usage(event_days=0), site.now, settle_seconds=0.5)
    exchange = Exchange()
    exchange.identity, exchange.sent_mono = _IDENTITY, 1.0
    usage.take([(exchange, "any", "live", "ok")])
    site.do(usage.start)
    site.wait(1.0)
    assert usage.down_because == "a defect"
    site.wait(9.0)
    assert usage.down_because == ""
    assert usage.unwritten_seconds() == 0.0
    # One of the four was in what cleans up, which is not tried again at once.
    assert (usage.lasting.defects, usage.counts["batches"], flaw.asked["tend_usage"]) == (4, 1, 1)


def test_who_asks_whether_a_request_was_charged_is_told_that_nobody_knows_and_the_next_one_hears_it(
    site: Site,
) -> None:
    flaw = Flaw(1)
    claims = Claims(FlawedClaims(flaw), cast("Ledger", None), settings.Ledger(), site.now)
    site.do(claims.start)
    told: list[object] = []

    async def ask() -> None:
        try:
            told.append(await claims.paid(bytes(32), Patience()))
        except Refusal as refusal:
            told.append(refusal.reason)

    for _ in range(2):
        site.do(lambda: site.loop.create_task(ask()))
        site.wait(0.01)
        assert claims.down_because == "a defect" or told[-1] is None
        site.wait(2.0)
    assert told == [Reason.LEDGER_UNAVAILABLE, None]
    assert (claims.lasting.defects, claims.down_because) == (1, "")


def test_claims_are_told_again_although_one_cannot_be_settled(site: Site) -> None:
    flaw = Flaw(1)

    class Book:
        def release(self, hold: Hold) -> Hold:
            return hold

        def settle(self, _hold: Hold, **_how: object) -> None:
            flaw.strike("settle")

    claims = Claims(ReferenceClaims(), cast("Ledger", Book()), settings.Ledger(), site.now)
    site.do(claims.start)
    for number in range(3):
        claims.add(_HOLD, bytes([number] * 32), 1, None)
    site.wait(3.0)
    assert (claims.pending, claims.lasting.defects, flaw.asked["settle"]) == (0, 1, 3)


@pytest.mark.parametrize("is_clumsy", [False, True])
def test_a_defect_is_logged_with_its_traceback_told_to_the_work_and_ends_nothing(
    site: Site, caplog: pytest.LogCaptureFixture, is_clumsy: bool
) -> None:
    flaw, told = Flaw(2), list[Exception]()

    async def work() -> None:
        flaw.strike("work")
        await asyncio.sleep(1_000.0)

    def failed(error: Exception) -> None:
        told.append(error)
        if is_clumsy:
            raise ValueError("and another one")

    lasting = Lasting("something")
    with caplog.at_level(logging.ERROR):
        site.do(lambda: lasting.start(work, failed))
        site.wait(1.5)
        assert flaw.asked["work"] == 2
        site.wait(10.0)
    assert (lasting.defects, flaw.asked["work"]) == (2, 3)
    assert [str(error) for error in told] == ["a defect"] * 2
    logged = [record for record in caplog.records if record.exc_info and record.exc_info[0] is RuntimeError]
    assert len(logged) == 2
    assert "something" in logged[0].getMessage()

    async def end() -> None:
        await lasting.end()
        told.clear()

    ending: list[Awaitable[None]] = []
    site.do(lambda: ending.append(site.loop.create_task(end())))
    site.wait(2_000.0)
    assert not told
    assert flaw.asked["work"] == 3
