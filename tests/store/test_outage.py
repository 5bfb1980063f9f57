"""An outage is logged once, however many parts notice it and however often."""

from __future__ import annotations

import asyncio
import logging

import pytest

from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import Missing, TimeBudget
from keyproxy.platform import clock
from keyproxy.reasons import Refusal
from keyproxy.store.outage import Outage
from keyproxy.store.postgres.database import StoreUnavailable
from keyproxy.store.store import Store
from tests import fakes
from tests.store.harness import Relay
from tests.store.usage.test_journal import ended, rows
from tests.waiting import until


class Log:
    """The log of an outage, with a clock set by the test."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.now = 100.0
        self._caplog = caplog
        self.outage = Outage("the store", lambda: self.now)

    @property
    def lines(self) -> list[str]:
        """The logged lines at level warning or above."""
        return [record.getMessage() for record in self._caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    """The log of an Outage that has not begun."""
    return Log(caplog)


def test_outage_is_logged_at_its_beginning_and_its_end(log: Log) -> None:
    log.outage.responded()
    for part in ("look-ups", "usage", "the ledger", "look-ups"):
        log.outage.met(f"{part} fail", is_main=part == "look-ups")
        log.now += 1.0
    assert log.lines == ["look-ups fail"]
    log.outage.responded()
    assert log.outage.is_on
    log.now += 3.0
    log.outage.responded()
    log.outage.responded()
    assert log.lines == ["look-ups fail", "the store is available again after 3 s"]
    log.outage.met("look-ups fail again", is_main=True)
    assert log.lines[2:] == ["look-ups fail again"]


def test_intermittent_responses_are_one_outage(log: Log) -> None:
    for _ in range(500):
        log.outage.met("it fails", is_main=True)
        log.now += 0.5
        log.outage.responded()
        log.now += 0.5
    assert log.lines == ["it fails"]


def test_failure_of_one_part_hides_no_outage_of_the_server(log: Log) -> None:
    for _ in range(20):
        log.outage.met("usage may not be written")
        log.outage.responded()
        log.now += 1.0
    log.outage.met("the store is down", is_main=True)
    log.outage.met("the store is down", is_main=True)
    assert log.lines == ["usage may not be written", "the store is down"]


async def test_all_parts_of_a_store_log_one_outage(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(
        schema.StoreSettings(),
        schema.Cache(),
        schema.LedgerSettings(lease_seconds=0.5),
        schema.Usage(),
        dsn=relay.dsn,
        header_prefix="X-Keyproxy-",
        now=clock.now,
    )
    caplog.set_level(logging.WARNING, "keyproxy")
    await store.open()
    try:
        await store.check_connection()
        await relay.cut()
        store.usage.take(rows(ended(fakes.identity("u_1", "acme"))))
        allowance = Allowance(((Pool("user", "u_1", False), Plan(requests_per_day=5)),))
        with pytest.raises(Missing) as missing:
            store.ledger.take(allowance, clock.now())
        with pytest.raises(Refusal):
            await missing.value.fetch_missing(TimeBudget())
        with pytest.raises(StoreUnavailable):
            await store.check_connection()
        await until(
            lambda: bool(
                store.usage.down_because and store.ledger.conversation.down_because and store.database.is_down
            ),
            "every part has noticed the outage",
            seconds=20,
        )
        # Time for retries of the feed, the ledger, usage, and the search for expired holders.
        await asyncio.sleep(2.5)
        (begun,) = [record.getMessage() for record in caplog.records]
        assert "is unavailable: " in begun
        await relay.mend()
        await until(lambda: not store.database.outage.is_on, "the outage is over", seconds=20)
        assert [record.getMessage().partition(" after ")[0] for record in caplog.records[1:]] == [
            "the store is available again"
        ]
    finally:
        await store.close()
