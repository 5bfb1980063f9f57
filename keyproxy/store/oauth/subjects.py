"""The users of subjects at an identity provider. Only the issuer and the subject identify a user, never an e-mail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keyproxy.store.oauth.transactions import in_transaction
from keyproxy.store.postgres.database import Row, StatementRunner, StoreConflict, Transaction


@dataclass(frozen=True, slots=True)
class LinkedUser:
    """The user that a subject is linked to. `is_disabled`: it is, or its tenant."""

    user_id: str
    tenant_id: str
    is_disabled: bool


class Subjects:
    """Finds the user of a subject, and creates it. All methods raise StoreUnavailable."""

    def __init__(self, database: StatementRunner) -> None:
        self._database = database

    async def find(self, issuer: str, subject: str) -> LinkedUser | None:
        """The user that the subject is linked to, None if it is not linked."""
        rows = await self._database.fetch("oauth_subject_user", issuer, subject)
        return _user(rows[0]) if rows else None

    async def create(self, issuer: str, subject: str, *, user_id: str, tenant_id: str) -> LinkedUser | None:
        """Link the subject to this user, which is created if there is none; return the user that it is linked to then.

        None: there is no such tenant, or the user belongs to another one. Of several processes that do this at once,
        each finds the same user.
        """

        async def creating(transaction: Transaction) -> Sequence[Row]:
            await transaction.fetch("oauth_create_user", user_id, tenant_id)
            # A statement of its own: it sees the user that another transaction has created meanwhile.
            await transaction.fetch("oauth_link_subject", issuer, subject, user_id, tenant_id)
            return await transaction.fetch("oauth_subject_user", issuer, subject)

        try:
            rows = await in_transaction(self._database, f"user:{user_id}", creating)
        except StoreConflict as error:
            # The tenant or the user has been deleted between two statements.
            if "_fkey" in error.constraint:
                return None
            raise
        return _user(rows[0]) if rows else None


def _user(row: Row) -> LinkedUser:
    return LinkedUser(row["user_id"], row["tenant_id"], row["is_disabled"])
