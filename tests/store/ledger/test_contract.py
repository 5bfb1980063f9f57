"""Every ledger backend behaves as the reference does, message by message."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from keyproxy.limits.calendar_windows import span
from keyproxy.limits.ledger.rules import LateMessageError
from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Window
from keyproxy.store.ledger.backend import REAP_PORTION, LedgerBackend
from keyproxy.store.ledger.postgres_backend import PostgresLedger, WindowState
from keyproxy.store.ledger.redis_backend import RedisLedger
from keyproxy.store.postgres.database import Database, StoreUnavailable
from tests import contracts
from tests.contracts import LEASE_SECONDS, InspectedBackend
from tests.reference_ledger import ReferenceLedger
from tests.store.harness import Sql, credit
from tests.store.redis_server import RedisServer, program


@dataclass
class _Stage:
    ledger: InspectedBackend
    brief: LedgerBackend
    add: Callable[[Window, int], Awaitable[None]]

    async def credit(self, window: Window, amount: int) -> None:
        await self.add(window, amount)


class _InMemory:
    """The reference, as a backend."""

    def __init__(self, rules: ReferenceLedger) -> None:
        self.rules = rules

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        try:
            return self.rules.sync(holder, serial, lines)
        except LateMessageError as error:
            raise StoreUnavailable(str(error)) from error

    async def reap(self, portion: int = REAP_PORTION) -> bool:
        del portion
        self.rules.reap()
        return False

    async def forget(self, portion: int) -> bool:
        del portion
        return False

    async def end(self, holder: str) -> None:
        self.rules.end(holder)

    async def close(self) -> None:
        pass

    async def windows(self, windows: Sequence[Window]) -> Sequence[WindowState | None]:
        now = time.time()
        states: list[WindowState | None] = []
        for window in windows:
            starts, ends = span(window.measure, now)
            row = self.rules.windows.get((window, starts))
            states.append(None if row is None else WindowState(row.spent, row.held, row.forfeited, ends - now, 0.0))
        return states


class TestReference(contracts.LedgerContract):
    """The rules in plain Python, which the simulations use."""

    @pytest.fixture
    def ledger_stage(self) -> contracts.LedgerStage:
        """The reference, in memory."""
        rules, brief = (ReferenceLedger(time.time, lease_seconds=seconds) for seconds in (LEASE_SECONDS, 0.0))
        brief.rules.windows, brief.rules.holders = rules.windows, rules.holders

        async def add(window: Window, amount: int) -> None:
            rules.rules.credit(window, amount, time.time())

        return _Stage(_InMemory(rules), _InMemory(brief), add)


class TestPostgres(contracts.LedgerContract):
    """PostgreSQL: one statement for each message."""

    @pytest.fixture
    async def ledger_stage(self, dsn: str, sql: Sql) -> AsyncIterator[contracts.LedgerStage]:
        """The backend over an empty database."""
        database = Database(dsn, pool_size_max=2, statement_timeout_seconds=5.0)
        await database.open()
        ledger, brief = (PostgresLedger(database, lease_seconds=seconds) for seconds in (LEASE_SECONDS, 0.0))
        yield _Stage(ledger, brief, functools.partial(credit, sql))
        await database.close()


@pytest.fixture(scope="module", params=["valkey", "redis"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server of either kind."""
    server = RedisServer(program(request.param), Path(tmp_path_factory.mktemp("r")))
    server.start()
    yield server
    server.stop()


class TestRedis(contracts.LedgerContract):
    """Redis: one script call for each message, with shares from PostgreSQL."""

    @pytest.fixture
    async def ledger_stage(self, dsn: str, sql: Sql, server: RedisServer) -> AsyncIterator[contracts.LedgerStage]:
        """The backend over an empty database and an empty server."""
        server.command("FLUSHALL")
        database = Database(dsn, pool_size_max=2, statement_timeout_seconds=5.0)
        await database.open()
        ledger, brief = (RedisLedger(server.url, database, lease_seconds=seconds) for seconds in (LEASE_SECONDS, 0.0))

        async def add(window: Window, amount: int) -> None:
            await credit(sql, window, amount)
            await ledger.refresh([window])

        yield _Stage(ledger, brief, add)
        await ledger.close()
        await brief.close()
        await database.close()
