"""Select the ledger backend that a configuration names."""

from __future__ import annotations

from keyproxy.config import schema
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.ledger.redis_backend import RedisLedger
from keyproxy.store.postgres.database import Database


def ledger_backend(database: Database, ledger: schema.LedgerSettings) -> PostgresLedger | RedisLedger:
    """Build the backend that `ledger.backend` names. Opens no connection.

    The caller still owns the database. The Redis backend uses it too, for shares of windows.
    """
    if ledger.backend == "postgres":
        return PostgresLedger(database, lease_seconds=ledger.lease_seconds)
    return RedisLedger(ledger.backend, database, lease_seconds=ledger.lease_seconds)
