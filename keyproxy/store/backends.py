"""Which ledger a configuration asks for."""

from __future__ import annotations

from keyproxy import settings
from keyproxy.store.database import Database
from keyproxy.store.ledger_postgres import PostgresLedger


def ledger_backend(database: Database, ledger: settings.Ledger) -> PostgresLedger:
    """Where windows are accounted, as `ledger.backend` says. Nothing is connected to yet."""
    return PostgresLedger(database, lease_seconds=ledger.lease_seconds)
