"""Statements through a connection of Django: the errors of the database, and whether a transaction is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import DatabaseError, InterfaceError, OperationalError, connections

from keyproxy_client.django.directory.errors import DirectoryRefused, DirectoryUnavailable

#: Class 40: the server rolled the transaction back because of another one. The application's own repetition applies.
_ROLLED_BACK = "40"
_UNDEFINED_TABLE = "42P01"


def is_in_transaction(alias: str) -> bool:
    """Whether the next statement is part of a transaction that lasts longer than the statement."""
    connection = connections[alias]
    return connection.in_atomic_block or not connection.get_autocommit()


@contextmanager
def translated() -> Iterator[None]:
    """Raise DirectoryUnavailable or DirectoryRefused for an error of the database.

    Serialization failures and deadlocks stay as they are: applications recognise them and repeat the transaction.
    """
    try:
        yield
    except (DatabaseError, InterfaceError) as error:
        if sqlstate(error).startswith(_ROLLED_BACK):
            raise
        if isinstance(error, OperationalError | InterfaceError):
            text = f"keyproxy's database did not perform the statement: {_first_line(error)}"
            raise DirectoryUnavailable(text) from error
        raise DirectoryRefused(f"keyproxy's database refuses the statement: {_first_line(error)}") from error


def sqlstate(error: Exception) -> str:
    """PostgreSQL's code for an error; empty if the server did not send one. psycopg2 has another name for it."""
    cause = error.__cause__
    return getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or ""


def explained(error: Exception) -> str:
    """An error of the database as one line, with what to do if a table of this package does not exist."""
    # SQLite has no codes.
    is_table_absent = sqlstate(error) == _UNDEFINED_TABLE or "no such table" in str(error)
    return _first_line(error) + ("; run manage.py migrate" if is_table_absent else "")


def _first_line(error: Exception) -> str:
    """Without PostgreSQL's DETAIL, which may show a row."""
    return str(error).partition("\n")[0]
