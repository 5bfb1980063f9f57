"""Which ledger a configuration asks for."""

from __future__ import annotations

from keyproxy import settings
from keyproxy.store.database import Database
from keyproxy.store.ledger_postgres import PostgresLedger
from keyproxy.store.ledger_redis import RedisLedger


def ledger_backend(database: Database, ledger: settings.Ledger) -> PostgresLedger | RedisLedger:
    """Where windows are accounted, as `ledger.backend` says. Nothing is connected to yet.

    The database stays the caller's; it is asked for shares of windows also where leases are Redis'.
    """
    if ledger.backend == "postgres":
        return PostgresLedger(database, lease_seconds=ledger.lease_seconds)
    return RedisLedger(ledger.backend, database, lease_seconds=ledger.lease_seconds)
