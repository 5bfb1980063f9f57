"""The transactions of the authorization server. In the audit log, their changes have an actor and this origin."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from keyproxy.store.postgres.database import StatementRunner, StoreUnavailable, Transaction
from keyproxy.store.postgres.failures import TRY_AGAIN

#: The origin of changes in the audit log.
ORIGIN: Final = "authorize"

_ATTEMPTS_MAX: Final = 3

_Result = TypeVar("_Result")


async def in_transaction(
    database: StatementRunner, actor: str, work: Callable[[Transaction], Awaitable[_Result]]
) -> _Result:
    """Run the work in a transaction of this actor, and again after a deadlock, which leaves no trace."""
    for attempt in range(_ATTEMPTS_MAX):
        try:
            async with database.transaction() as begun:
                await begun.fetch("say_who_acts", actor, ORIGIN)
                return await work(begun)
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, TRY_AGAIN) or attempt == _ATTEMPTS_MAX - 1:
                raise
    raise AssertionError("the last attempt is final")
