"""A migrated database that tests share, one after the other: emptying it is much faster than cloning one."""

from __future__ import annotations

import asyncio

import asyncpg
import uvloop

#: Makes the function that removes all rows. Its statements are planned once for the connection: for each test, that would
#: take most of the time of deleting nothing. The replica role allows deletes from the audit log.
_PREPARE = """
SET session_replication_role = replica;
DO $$
BEGIN
    EXECUTE (
        SELECT 'CREATE FUNCTION pg_temp.empty() RETURNS void LANGUAGE plpgsql AS $body$ BEGIN '
               || string_agg(format('DELETE FROM %s;', c.oid::regclass), ' ' ORDER BY c.relname)
               || ' UPDATE keyproxy.ledger_history SET changed_at = ''-infinity'', settles_until = ''-infinity'';'
               || ' END $body$'
        FROM pg_class AS c
        WHERE c.relnamespace = 'keyproxy'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
          AND c.relname NOT IN ('migrations', 'ledger', 'ledger_history')
    );
END
$$;
"""

#: Removes what a test may leave behind: connections, then rows.
_EMPTY = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid();
SELECT pg_temp.empty();
"""


class CommonDatabase:
    """Empties the database over one connection: a new one would spend most of its time on reading the catalog."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    def empty(self) -> None:
        """Make it as new. Must not be called while an event loop runs."""
        self._runner.run(self._empty())

    def close(self) -> None:
        self._runner.run(self._disconnect())
        self._runner.close()

    async def _empty(self) -> None:
        if self._connection is not None:
            try:
                await self._connection.execute(_EMPTY)
            except (asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.InterfaceError, OSError):
                # A test has ended all connections to the database.
                await self._disconnect()
            else:
                return
        self._connection = await asyncpg.connect(self.dsn)
        await self._connection.execute(_PREPARE)
        await self._connection.execute(_EMPTY)

    async def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
