"""Requests that wait for a missing value: decided again once it is there, and never left without a response."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from keyproxy.decision.undecided import Undecided
from keyproxy.model import Missing, Permit, PublicGrant, Route, TimeBudget
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import Reason, Refusal

PERMIT = Permit(PublicGrant(Route("GET /a")))


class FakeExchange(Exchange):
    """Keeps its refusal."""

    def __init__(self) -> None:
        self.request_id = b"r-1"
        self.is_over = False
        self.refusals: list[Reason] = []

    def refuse(self, refusal: Refusal) -> None:
        """See the port."""
        self.refusals.append(refusal.reason)


class Decisions:
    """Decisions that need a value, and the lookup of the value, which the test ends."""

    def __init__(self) -> None:
        self.is_there = False
        self.made = 0
        self.error: Exception | None = None
        self.admitted: list[Exchange] = []
        self.waiting: list[Callable[[Refusal | None], None]] = []
        self.undecided = Undecided(self.decide, self.admit)

    def decide(self, _exchange: Exchange) -> Permit:
        """Raises Missing until the value is there."""
        self.made += 1
        if self.error is not None:
            raise self.error
        if not self.is_there:
            raise self.missing()
        return PERMIT

    def admit(self, exchange: Exchange, permit: Permit) -> None:
        """Keep the exchange."""
        assert permit is PERMIT
        self.admitted.append(exchange)

    def missing(self) -> Missing:
        """The value, by a lookup without a task; a task that looks it up finds it."""
        return Missing("identity", self.fetch, self.waiting.append)

    async def fetch(self, _patience: TimeBudget) -> None:
        """Find the value."""
        self.is_there = True

    def end(self, failure: Refusal | None = None) -> None:
        """End all lookups."""
        waiting, self.waiting = self.waiting, []
        for done in waiting:
            done(failure)


async def test_request_that_waits_for_a_lookup_has_no_task_and_is_undecided() -> None:
    decisions, exchange = Decisions(), FakeExchange()
    tasks = asyncio.all_tasks()
    decisions.undecided.fetch(exchange, decisions.missing())
    assert asyncio.all_tasks() == tasks
    assert decisions.undecided
    decisions.is_there = True
    decisions.end()
    assert decisions.admitted == [exchange]
    assert not decisions.undecided


async def test_end_is_awaited_for_lookups_and_tasks_alike() -> None:
    decisions, exchange = Decisions(), FakeExchange()
    may_end = asyncio.Event()

    async def wait(_patience: TimeBudget) -> None:
        await may_end.wait()
        decisions.is_there = True

    decisions.undecided.fetch(exchange, decisions.missing())
    decisions.undecided.fetch(exchange, Missing("body", wait))
    both = [asyncio.create_task(decisions.undecided.all_ended()) for _ in range(2)]
    await asyncio.sleep(0)
    may_end.set()
    async with asyncio.timeout(5):
        while len(decisions.admitted) < 1:
            await asyncio.sleep(0)
    assert not any(one.done() for one in both)
    decisions.end()
    async with asyncio.timeout(5):
        await asyncio.gather(*both)
    assert decisions.admitted == [exchange] * 2


@pytest.mark.parametrize("is_needed", [False, True])
async def test_failed_lookup_refuses_only_if_the_decision_still_needs_the_value(is_needed: bool) -> None:
    decisions, exchange = Decisions(), FakeExchange()
    decisions.undecided.fetch(exchange, decisions.missing())
    decisions.is_there = not is_needed
    decisions.end(Refusal(Reason.STORE_UNAVAILABLE))
    assert exchange.refusals == ([Reason.STORE_UNAVAILABLE] if is_needed else [])
    assert len(decisions.admitted) == (0 if is_needed else 1)


async def test_value_that_is_missing_again_is_fetched_again() -> None:
    decisions, exchange = Decisions(), FakeExchange()
    decisions.undecided.fetch(exchange, decisions.missing())
    decisions.end()
    assert decisions.undecided
    async with asyncio.timeout(5):
        await decisions.undecided.all_ended()
    assert decisions.admitted == [exchange]


async def test_exchange_that_is_over_is_not_decided_on() -> None:
    decisions, exchange = Decisions(), FakeExchange()
    decisions.undecided.fetch(exchange, decisions.missing())
    exchange.is_over = True
    decisions.end()
    assert (decisions.made, decisions.admitted, exchange.refusals) == (0, [], [])
    assert not decisions.undecided


@pytest.mark.parametrize(
    ("error", "reason"),
    [(Refusal(Reason.KEY_REVOKED), Reason.KEY_REVOKED), (ZeroDivisionError(), Reason.INTERNAL_ERROR)],
)
async def test_decision_that_fails_after_a_lookup_is_refused(
    error: Exception, reason: Reason, caplog: pytest.LogCaptureFixture
) -> None:
    decisions, exchange = Decisions(), FakeExchange()
    decisions.undecided.fetch(exchange, decisions.missing())
    decisions.error = error
    decisions.end()
    assert exchange.refusals == [reason]
    assert ("request decision failed" in caplog.text) is (reason is Reason.INTERNAL_ERROR)


async def test_only_a_missing_value_with_a_lookup_is_fetched_without_a_task() -> None:
    decisions, exchange = Decisions(), FakeExchange()
    decisions.undecided.fetch(exchange, Missing("body", decisions.fetch))
    assert not decisions.waiting
    async with asyncio.timeout(5):
        await decisions.undecided.all_ended()
    assert decisions.admitted == [exchange]
