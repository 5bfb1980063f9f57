"""Ledger backends reply as the rules do, whatever hypothesis sends, loses, repeats and credits.

The contract sends random messages; here hypothesis chooses them, with a preference for edges, and makes a sequence on
which a backend differs from the rules as short as it can.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from keyproxy.limits.ledger_protocol import LeaseReport, Pool, Window
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.ledger.redis_backend import RedisLedger
from keyproxy.store.postgres.database import Database, StoreUnavailable
from tests.contracts import LEASE_SECONDS, InspectedBackend, assert_same_reply
from tests.reference_ledger import ReferenceLedger, timed
from tests.store.redis_harness import servers

#: Measures that count in windows, with a selector, and rates. None of them ends within a run, except at midnight.
_COUNTED = (
    ("requests_per_month", ""), ("requests_per_month", "model:gpt-4o"), ("spend_per_week", "mode:live,route:a:b"),
    ("concurrency", ""), ("concurrency", "model:a:b"), ("requests_total", ""), ("tokens_total", ""),
)  # fmt: skip
_RATES = (("rate", ""), ("token_rate", "model:gpt-4o"))
_INTERVAL_SECONDS = 1e6

_SMALL = st.integers(0, 12)
_EXAMPLES = itertools.count()

Credit = Callable[[Window, int], Awaitable[None]]


class _Lease:
    """A lease as its holder knows it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.granted = self.used = self.returned = self.starts = 0


class _Backend(NamedTuple):
    """A backend, with the loop that it runs on."""

    run: Callable[[Any], Any]
    ledger: InspectedBackend
    credit: Credit


class Line(NamedTuple):
    """What one line reports and requests; a negative use of a rate returns units."""

    window: int
    place: int
    used: int
    returned: int
    want: int
    at_least: int
    most: int
    is_closing: bool
    lowers_limit: bool


_LINES = st.lists(
    st.builds(
        Line, st.integers(0, len(_COUNTED) + len(_RATES) - 1), st.integers(0, 1), _SMALL, _SMALL, _SMALL, _SMALL, _SMALL,
        st.booleans(), st.booleans(),
    ),
    max_size=6, unique_by=lambda line: (line.window, line.place),
)  # fmt: skip


class Messages(RuleBasedStateMachine):
    """Holders that send messages to a backend and to the rules."""

    def __init__(self, backend: _Backend) -> None:
        super().__init__()
        self.backend = backend
        self.reference = ReferenceLedger(time.time, lease_seconds=LEASE_SECONDS)
        self.example = next(_EXAMPLES)
        self.names: list[str] = []
        self.serials: dict[str, int] = {}
        self.leases: dict[tuple[str, int, int], _Lease] = {}
        self.numbers = itertools.count(1)
        self.limits: list[int] = []
        #: The windows of which units were requested. A backend may not know of earlier credits to others.
        self.requested: set[int] = set()

    @initialize(
        number=st.integers(1, 3),
        limits=st.lists(st.integers(0, 40), min_size=len(_COUNTED + _RATES), max_size=len(_COUNTED + _RATES)),
    )
    def begin(self, number: int, limits: list[int]) -> None:
        """Choose the limits, and start holders."""
        self.limits = limits
        for _ in range(number):
            self._start()

    def _start(self) -> None:
        name = f"{self.example}-{len(self.serials)}"
        self.names.append(name)
        self.serials[name] = 0

    def _window(self, number: int) -> Window:
        measure, selector = (*_COUNTED, *_RATES)[number]
        return Window(Pool("user", f"u_{self.example}", False), measure, selector)

    @rule(number=st.integers(0, 2), lines=_LINES, is_reply_lost=st.booleans())
    def send(self, number: int, lines: list[Line], is_reply_lost: bool) -> None:
        """Send a message; both reply alike."""
        name = self.names[number % len(self.names)]
        self.serials[name] += 1
        reports = [self._report(name, line) for line in lines]
        told = timed(*reports)
        replies = self.backend.run(self.backend.ledger.sync(name, self.serials[name], told))
        assert replies is not None
        expected = self.reference.follow(name, self.serials[name], told, replies)
        assert expected is not None
        self.requested |= {line.window for line in lines if line.want and not line.is_closing}
        unknown = {
            report.lease for report, line in zip(reports, lines, strict=True) if line.window not in self.requested
        }
        for one, other in zip(sorted(expected), sorted(replies), strict=True):
            assert_same_reply(one._replace(credited=other.credited) if one.lease in unknown else one, other)
        granted = {} if is_reply_lost else {reply.lease: reply for reply in replies}
        for lease in self.leases.values():
            if lease.number in granted:
                lease.granted, lease.starts = granted[lease.number].granted, granted[lease.number].starts

    def _report(self, name: str, line: Line) -> LeaseReport:
        limit = max(0, self.limits[line.window] - line.lowers_limit)
        at_least = min(max(1, line.at_least), line.want)
        most = min(max(line.most, at_least), line.want) if line.most else 0
        if line.window >= len(_COUNTED):
            returned = line.returned - line.used if line.place else 0
            return LeaseReport(
                1_000_000 + line.window * 2 + line.place, self._window(line.window), 0, max(1, limit), _INTERVAL_SECONDS,
                0, 0, returned, line.want, at_least, most, False, time.time() if returned > 0 else 0.0,
            )  # fmt: skip
        key = name, line.window, line.place
        lease = self.leases.setdefault(key, _Lease(next(self.numbers)))
        left = lease.granted - lease.used - lease.returned
        # One more than was granted, now and then.
        lease.used += max(0, min(line.used, left + (line.used == 12)))
        lease.returned += max(0, min(line.returned, lease.granted - lease.used - lease.returned))
        want = 0 if line.is_closing else line.want
        if line.is_closing:
            del self.leases[key]
        return LeaseReport(
            lease.number, self._window(line.window), lease.starts, limit, 0.0, lease.granted, lease.used, lease.returned,
            want, min(at_least, want), min(most, want), line.is_closing,
        )  # fmt: skip

    @rule(number=st.integers(0, 2))
    def repeat(self, number: int) -> None:
        """Send a message whose serial was processed; it changes nothing."""
        name = self.names[number % len(self.names)]
        if self.serials[name]:
            with pytest.raises(StoreUnavailable):
                self.backend.run(self.backend.ledger.sync(name, self.serials[name], []))

    @precondition(lambda self: len(self.serials) < 6)
    @rule(number=st.integers(0, 2))
    def end(self, number: int) -> None:
        """End a holder, and start another one."""
        name = self.names.pop(number % len(self.names))
        self.reference.end(name)
        self.backend.run(self.backend.ledger.end(name))
        self.leases = {key: lease for key, lease in self.leases.items() if key[0] != name}
        self._start()

    @rule(number=st.integers(0, 2), amount=st.integers(-5, 20).filter(bool))
    def credit(self, number: int, amount: int) -> None:
        """Add an amount to a window's limit."""
        window = self._window(number)
        self.reference.rules.credit(window, amount, time.time())
        self.backend.run(self.backend.credit(window, amount))

    def teardown(self) -> None:
        """End all holders: nothing is held then, and both have the same account of every window."""
        for name in self.names:
            self.reference.end(name)
            self.backend.run(self.backend.ledger.end(name))
        rows = {of: row for (of, _), row in self.reference.windows.items() if of.measure not in ("rate", "token_rate")}
        for (of, row), state in zip(
            rows.items(), self.backend.run(self.backend.ledger.windows(list(rows))), strict=True
        ):
            assert state is not None
            assert (row.spent, 0, row.forfeited) == (state.spent, state.held, state.forfeited), of


@pytest.fixture(params=["postgres", "redis"])
def backend(dsn: str, request: pytest.FixtureRequest, short_directory: Path) -> Iterator[_Backend]:
    """A backend over an empty database."""
    with asyncio.Runner() as runner, servers(short_directory) as make_server:
        database = Database(dsn, pool_size_max=2, statement_timeout_seconds=5.0)
        runner.run(database.open())
        redis: RedisLedger | None = None
        if request.param == "redis":
            redis = RedisLedger(make_server().url, database, lease_seconds=LEASE_SECONDS)

        async def credit(window: Window, amount: int) -> None:
            await database.fetch(
                "credit_window", *window.pool, window.measure, window.selector, 1_000_000, amount, "test"
            )
            if redis is not None:
                await redis.refresh([window])

        yield _Backend(runner.run, redis or PostgresLedger(database, lease_seconds=LEASE_SECONDS), credit)
        if redis is not None:
            runner.run(redis.close())
        runner.run(database.close())


def test_backend_replies_as_the_rules_do(backend: _Backend) -> None:
    class MessagesToBackend(Messages):
        def __init__(self) -> None:
            super().__init__(backend)

    run_state_machine_as_test(
        MessagesToBackend,
        settings=settings(
            max_examples=30, stateful_step_count=25, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
