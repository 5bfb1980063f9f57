"""The ledger in PostgreSQL: one message is one statement is one transaction. See migrations/0023_agent_budgets.sql."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Window
from keyproxy.store.ledger.backend import REAP_PORTION
from keyproxy.store.postgres.database import Database

#: Columns of lines in `sync_leases`.
_COLUMNS: Final = 17


class WindowState(NamedTuple):
    """The state of a current window. `ends_seconds` from now; `ahead_seconds`: until a rate is fully recovered.

    The window's limit is that of the plan and `credited` together.
    """

    spent: int
    held: int
    forfeited: int
    ends_seconds: float
    ahead_seconds: float
    credited: int = 0


class PostgresLedger:
    """Account for windows in PostgreSQL. Implements the port LedgerBackend."""

    def __init__(self, database: Database, *, lease_seconds: float, alert_percentages: Sequence[int] = ()) -> None:
        """`alert_percentages`: of a window's limit and credit together, at which the ledger writes an alert."""
        self._database = database
        self._lease_seconds = lease_seconds
        self._alert_percentages = sorted(alert_percentages)

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        columns = zip(*(_flat(line) for line in lines), strict=True) if lines else ([] for _ in range(_COLUMNS))
        rows = await self._database.fetch(
            "sync_leases", holder, serial, self._lease_seconds, self._alert_percentages,
            *(list(column) for column in columns),
        )  # fmt: skip
        if not rows:
            return None
        # The first row is passed on only if the ledger grants nothing for now (`wait_seconds`).
        return [LeaseGrant(*row) for row in rows if row["lease"] or row["wait_seconds"]]

    async def reap(self, portion: int = REAP_PORTION) -> bool:
        rows = await self._database.fetch("reap_holders", portion)
        return bool(rows[0]["done"])

    async def forget(self, portion: int) -> bool:
        rows = await self._database.fetch("forget_holders", portion)
        return bool(rows[0]["gone"] >= portion)

    async def end(self, holder: str) -> None:
        await self._database.fetch("end_holders", [holder])

    async def windows(self, windows: Sequence[Window]) -> Sequence[WindowState | None]:
        """The current state of windows, in their order; None for a window that was never used."""
        rows = await self._database.fetch(
            "windows_now",
            [window.pool.kind for window in windows],
            [window.pool.owner for window in windows],
            [window.pool.is_test for window in windows],
            [window.measure for window in windows],
            [window.selector for window in windows],
        )
        found = {row["number"]: WindowState(*tuple(row)[1:]) for row in rows}
        return [found.get(number) for number in range(1, len(windows) + 1)]

    def refresh_soon(self, window: Window, then: Callable[[Window], None]) -> None:
        """Continue with `then`: every message reads the windows."""
        then(window)

    async def close(self) -> None:
        """Do nothing: the store closes the database."""


def _flat(line: LeaseReport) -> tuple[object, ...]:
    pool, measure, selector = line.window
    return (line.lease, *pool, measure, selector, *line[2:])
