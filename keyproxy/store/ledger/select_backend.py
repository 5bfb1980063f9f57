"""Select the ledger backend that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from keyproxy.config import schema
from keyproxy.limits.ledger_protocol import Window
from keyproxy.store.ledger.backend import LedgerBackend
from keyproxy.store.ledger.postgres_backend import PostgresLedger, WindowState
from keyproxy.store.postgres.database import Database


class WindowReader(Protocol):
    """A source of the current state of windows."""

    async def windows(self, windows: Sequence[Window]) -> Sequence[WindowState | None]:
        """The current state of windows, in their order; None for a window that was never used."""
        ...


class SelectedBackend(WindowReader, LedgerBackend, Protocol):
    """What both backends offer."""

    def refresh_soon(self, window: Window, then: Callable[[Window], None]) -> None:
        """Read a window again that was changed in PostgreSQL by a credit, and continue with `then`."""
        ...


def ledger_backend(
    database: Database, ledger: schema.LedgerSettings, alert_percentages: Sequence[int] = ()
) -> SelectedBackend:
    """Build the backend that `ledger.backend` names. Opens no connection.

    `alert_percentages`: of a limit, at which the ledger writes an alert. The caller still owns
    the database. The Redis backend uses it too, for shares of windows.
    """
    if ledger.backend == "postgres":
        return PostgresLedger(database, lease_seconds=ledger.lease_seconds, alert_percentages=alert_percentages)
    # Its library takes a sixth of the start of a command. A store is built before it serves; see also `preload`.
    from keyproxy.store.ledger.redis_backend import RedisLedger

    return RedisLedger(
        ledger.backend, database, lease_seconds=ledger.lease_seconds, alert_percentages=alert_percentages
    )


def preload(ledger: schema.LedgerSettings) -> None:
    """Import what `ledger_backend` would, for a process that builds backends while it serves."""
    if ledger.backend != "postgres":
        from keyproxy.store.ledger import redis_backend  # noqa: F401
