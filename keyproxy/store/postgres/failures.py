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
NO_ANSWER: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

#: A prepared statement that is not there, or there already: signs of a pooler in transaction mode.
POOLER_SIGNS: Final = (
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.DuplicatePreparedStatementError,
    asyncpg.ProtocolViolationError,
)

#: The statement had no effect and can be sent again as it was.
TRY_AGAIN: Final = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)

#: The server has judged the statement and refuses it. A value that Python cannot hold is one that no change fixes here.
_CONFLICTS: Final = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.RaiseError,
    OverflowError,
    UnicodeDecodeError,
)

#: PostgreSQL's own function behind RAISE: an error of one of our functions, not of the server.
_RAISED: Final = "exec_stmt_raise"


class StoreUnavailable(Exception):
    """The store is unavailable. Implies nothing about the result."""


class StoreConflict(Exception):
    """The store refused a change. `constraint` is the name of the constraint, if it was one."""

    def __init__(self, message: str, constraint: str) -> None:
        super().__init__(message)
        self.constraint = constraint


class NotPrimaryError(Exception):
    """The server is read-only, so another one may be ahead of it. Its results are not to be trusted."""


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Translate what asyncpg raises. `where`: the server and the database, for the message."""
    try:
        yield
    except _CONFLICTS as error:
        raise StoreConflict(first_line(error), getattr(error, "constraint_name", None) or "") from error
    except NotPrimaryError as error:
        raise StoreUnavailable(f"{where}: {error}") from error
    except NO_ANSWER as error:
        raise StoreUnavailable(f"{where}: {type(error).__name__}: {first_line(error)}") from error


def means_move(error: BaseException | None) -> bool:
    """Whether the database may be served by another server now, so that its name has to be resolved again."""
    if isinstance(error, TimeoutError | asyncpg.QueryCanceledError | asyncpg.TooManyConnectionsError):
        return False
    if isinstance(error, asyncpg.ObjectNotInPrerequisiteStateError):
        # A standby refuses some functions with the code that our ledger raises about its own messages.
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
        | asyncpg.InternalClientError
    )  # fmt: skip


def took_too_long(error: StoreUnavailable) -> bool:
    """Whether the server was reached and did not respond in time."""
    return isinstance(error.__cause__, TimeoutError | asyncpg.QueryCanceledError)


def first_line(error: BaseException) -> str:
    """The message of an error, without what follows its first line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
