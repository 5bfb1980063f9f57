"""Temporary databases: one per run of the demo, one per test, cloned from a template."""

from __future__ import annotations

from keyproxy.store.postgres.connecting import Connector


async def create(maintenance_dsn: str, name: str, *, template: str | None = None) -> None:
    """Create a database, empty or as a copy of `template`, which must have no connections."""
    connection = await Connector(maintenance_dsn).connect(command_seconds=0, caches_statements=False)
    try:
        copied = f' TEMPLATE "{template}" STRATEGY FILE_COPY' if template is not None else ""
        await connection.execute(f'CREATE DATABASE "{name}"{copied}')
    finally:
        await connection.close()


async def drop(maintenance_dsn: str, name: str) -> None:
    """Drop a database and terminate its connections."""
    connection = await Connector(maintenance_dsn).connect(command_seconds=0, caches_statements=False)
    try:
        await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    finally:
        await connection.close()


async def drop_unused(maintenance_dsn: str, prefix: str) -> None:
    """Drop the databases with this prefix that have no connections: leftovers of killed runs."""
    connection = await Connector(maintenance_dsn).connect(command_seconds=0, caches_statements=False)
    try:
        names = await connection.fetch(
            "SELECT datname FROM pg_database AS d WHERE starts_with(datname, $1)"
            " AND NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.datname = d.datname)",
            prefix,
        )
        for row in names:
            await connection.execute(f'DROP DATABASE IF EXISTS "{row["datname"]}"')
    finally:
        await connection.close()
