"""Select the ledger backend that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

from keyproxy.config import schema
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.ledger.redis_backend import RedisLedger
from keyproxy.store.postgres.database import Database


def ledger_backend(
    database: Database, ledger: schema.LedgerSettings, alert_percentages: Sequence[int] = ()
) -> PostgresLedger | RedisLedger:
    """Build the backend that `ledger.backend` names. Opens no connection.

    `alert_percentages`: of a limit, at which the ledger writes an alert. The caller still owns
    the database. The Redis backend uses it too, for shares of windows.
    """
    if ledger.backend == "postgres":
        return PostgresLedger(database, lease_seconds=ledger.lease_seconds, alert_percentages=alert_percentages)
    return RedisLedger(
        ledger.backend, database, lease_seconds=ledger.lease_seconds, alert_percentages=alert_percentages
    )
