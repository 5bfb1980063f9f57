"""Which ledger a configuration asks for."""

from __future__ import annotations

from keyproxy.config import schema
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.ledger.redis_backend import RedisLedger
from keyproxy.store.postgres.database import Database


def ledger_backend(database: Database, ledger: schema.Ledger) -> PostgresLedger | RedisLedger:
    """Where windows are accounted, as `ledger.backend` says. Nothing is connected to yet.

    The database stays the caller's; it is asked for shares of windows also where leases are Redis'.
    """
    if ledger.backend == "postgres":
        return PostgresLedger(database, lease_seconds=ledger.lease_seconds)
    return RedisLedger(ledger.backend, database, lease_seconds=ledger.lease_seconds)
