"""The two ways in which the store fails, and the meaning of each asyncpg error.

`StoreUnavailable` means that there is no result: no connection, a timeout, a server that is starting, has failed over
or is read-only, a missing schema. `StoreConflict` means that the server refuses a change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import asyncpg

#: No result. asyncpg raises InternalClientError when a connection is lost in the middle of its own housekeeping.
NO_RESPONSE: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

#: A prepared statement does not exist, or exists already: signs of a pooler in transaction mode.
POOLER_SIGNS: Final = (
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.DuplicatePreparedStatementError,
    asyncpg.ProtocolViolationError,
)

#: The statement had no effect and can be sent again as it was.
TRY_AGAIN: Final = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)

#: The server rejects the statement. A value that Python cannot encode belongs here too: a retry would not help.
_CONFLICTS: Final = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.RaiseError,
    OverflowError,
    UnicodeDecodeError,
)

#: PostgreSQL's internal function behind RAISE: marks errors raised by our own functions, not by the server.
_RAISED: Final = "exec_stmt_raise"


class StoreUnavailable(Exception):
    """The store is unavailable. Implies nothing about the result."""


class StoreConflict(Exception):
    """The store refused a change. `constraint` is the name of the violated constraint, if any."""

    def __init__(self, message: str, constraint: str) -> None:
        super().__init__(message)
        self.constraint = constraint


class NotPrimaryError(Exception):
    """The server is read-only, so another one may be ahead of it. Its results must not be used."""


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Translate what asyncpg raises. `where`: the server and the database, for the message."""
    try:
        yield
    except _CONFLICTS as error:
        raise StoreConflict(first_line(error), getattr(error, "constraint_name", None) or "") from error
    except NotPrimaryError as error:
        raise StoreUnavailable(f"{where}: {error}") from error
    except NO_RESPONSE as error:
        raise StoreUnavailable(f"{where}: {type(error).__name__}: {first_line(error)}") from error


def means_move(error: BaseException | None) -> bool:
    """Whether the database may be served by another server now, so that its name has to be resolved again."""
    if isinstance(error, TimeoutError | asyncpg.QueryCanceledError | asyncpg.TooManyConnectionsError):
        return False
    if isinstance(error, asyncpg.ObjectNotInPrerequisiteStateError):
        # A standby refuses some functions with the same code that our ledger raises for messages.
        return getattr(error, "server_source_function", None) != _RAISED
    return isinstance(
        error,
        OSError
        | NotPrimaryError
        | asyncpg.ReadOnlySQLTransactionError
        | asyncpg.OperatorInterventionError
        | asyncpg.PostgresConnectionError
        # asyncpg raises this for a connection that was closed between two statements.
        | asyncpg.InterfaceError
        | asyncpg.InternalClientError,
    )


def took_too_long(error: StoreUnavailable) -> bool:
    """Whether the server was reached and did not respond in time."""
    return isinstance(error.__cause__, TimeoutError | asyncpg.QueryCanceledError)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
