"""What a browser login reads and writes: the key of a login, a consent with its code, and the connections of a user.

A consent is one transaction: the row of the client, the grant and the code exist together or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from keyproxy.oauth.client import Client, ClientKind
from keyproxy.store.directory.entities import random_digits
from keyproxy.store.oauth.transactions import in_transaction
from keyproxy.store.postgres.database import Row, StatementRunner, StoreConflict, Transaction

CODE_SECONDS: Final = 60

#: More rows of a user are not shown.
CONNECTIONS_MAX: Final = 500

_ID_DIGITS: Final = 22

#: The trigger that ties a code to the key of its login, and the references of a code to its login and user.
_LOGIN_CONSTRAINTS: Final = frozenset(
    {
        "oauth_codes_via_key",
        "oauth_codes_via_key_fkey",
        "oauth_codes_via_issuer_via_subject_fkey",
        "oauth_grants_user_id_fkey",
    }
)


class ConsentRefused(Exception):
    """A consent that has no effect. `why`: `client_unknown`, `client_disabled`, `account_disabled`, `login_ended`,
    `scopes_missing` or `service_client`."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True, slots=True)
class ConsentingUser:
    """The user who consents, and the login: by a key, by a subject of an identity provider, or neither."""

    user_id: str
    via_key: str | None = None
    via_issuer: str | None = None
    via_subject: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class NewCode:
    """An authorization code and what it stands for. `digest`: SHA-256 of the code."""

    digest: bytes = field(repr=False)
    redirect_uri: str
    challenge: bytes = field(repr=False)
    resource: str
    is_test: bool
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Consented:
    """What a consent has made. `scopes`: those of the code. `is_new_client`: the client had no row."""

    grant_id: str
    scopes: tuple[str, ...]
    is_new_client: bool


class Authorizations:
    """The operations of browser logins. All methods raise StoreUnavailable."""

    def __init__(self, database: StatementRunner, now: Callable[[], datetime] | None = None) -> None:
        """`now`: a clock in place of the database's, from which a code lives."""
        self._database = database
        self._now = now

    async def key(self, digest: bytes) -> Row | None:
        """The key of a login, None if there is none with this digest."""
        rows = await self._database.fetch("login_key", digest)
        return rows[0] if rows else None

    async def consent(self, client: Client, user: ConsentingUser, code: NewCode) -> Consented:
        """Store the client, the grant and the code. Raises ConsentRefused."""

        async def consenting(transaction: Transaction) -> Consented:
            return await self._consent(transaction, client, user, code)

        try:
            return await in_transaction(self._database, _actor(user.user_id), consenting)
        except StoreConflict as conflict:
            if conflict.constraint in _LOGIN_CONSTRAINTS:
                raise ConsentRefused("login_ended") from conflict
            raise

    async def _consent(
        self, transaction: Transaction, client: Client, user: ConsentingUser, code: NewCode
    ) -> Consented:
        now = None if self._now is None else self._now()
        code = replace(code, scopes=await self._permitted(transaction, user, code.scopes))
        is_new = await self._keep_client(transaction, client)
        grant_id = await self._grant(transaction, client, user, code, now=now)
        await transaction.fetch(
            "add_oauth_code", code.digest, grant_id, client.presented_as, code.redirect_uri, code.challenge,
            code.scopes, user.via_key, user.via_issuer, user.via_subject, CODE_SECONDS, now,
        )  # fmt: skip
        return Consented(grant_id, code.scopes, is_new)

    async def is_login_good(self, user: ConsentingUser) -> bool:
        """Whether the user is enabled and the key or subject of the login still works."""
        row = await self._database.fetch("consenting_user", *_login(user))
        return bool(row) and row[0]["is_enabled"] and row[0]["is_login_good"]

    async def connections(self, user_id: str, *, is_test: bool | None) -> list[Row]:
        """The programs and devices of a user, the newest first. `is_test`: only those of this mode; None: all."""
        return list(await self._database.fetch("connections_of_user", user_id, is_test, CONNECTIONS_MAX + 1))

    async def end_session(self, user_id: str, session_id: str, *, is_test: bool | None) -> int:
        """End one session of the user. Returns how many have ended."""

        async def ending(transaction: Transaction) -> int:
            return len(await transaction.fetch("end_oauth_session_of_user", user_id, is_test, session_id))

        return await in_transaction(self._database, _actor(user_id), ending)

    async def end_grants(self, user_id: str, grant_id: str | None, *, is_test: bool | None) -> int:
        """End one grant of the user, or all of them for None. Returns how many sessions have ended."""

        async def ending(transaction: Transaction) -> int:
            row = await transaction.fetch_row("end_oauth_grants_of_user", user_id, is_test, grant_id)
            return 0 if row is None else int(row["sessions"])

        return await in_transaction(self._database, _actor(user_id), ending)

    async def _permitted(
        self, transaction: Transaction, user: ConsentingUser, wanted: tuple[str, ...]
    ) -> tuple[str, ...]:
        """The wanted scopes that the login still permits. Raises ConsentRefused."""
        if user.via_key is not None:
            # First of all, as a revocation does, which then ends codes and sessions.
            await transaction.fetch("hold_login_key", user.via_key)
        elif user.via_issuer is not None:
            await transaction.fetch("hold_login_subject", user.via_issuer, user.via_subject)
        row = await transaction.fetch_row("consenting_user", *_login(user))
        if row is None or not row["is_enabled"]:
            raise ConsentRefused("account_disabled")
        if not row["is_login_good"]:
            raise ConsentRefused("login_ended")
        if row["scopes"] is None:
            return wanted
        permitted = tuple(scope for scope in wanted if scope in row["scopes"])
        if wanted and not permitted:
            raise ConsentRefused("scopes_missing")
        return permitted

    async def _keep_client(self, transaction: Transaction, client: Client) -> bool:
        """Enter or update the client, which locks its row, and return whether it is new. Raises ConsentRefused."""
        kept = None
        if client.kind is not ClientKind.REGISTERED:
            kept = await transaction.fetch_row(
                "keep_oauth_client", client.row_id, client.client_id, client.kind.value, client.name,
                client.redirect_uris, client.auth_method.value, client.jwks,
            )  # fmt: skip
        row = await transaction.fetch_row("hold_oauth_client", client.row_id)
        if row is None:
            raise ConsentRefused("client_unknown")
        if row["is_disabled"]:
            raise ConsentRefused("client_disabled")
        return kept is not None and kept["is_new"]

    async def _grant(
        self, transaction: Transaction, client: Client, user: ConsentingUser, code: NewCode, *, now: datetime | None
    ) -> str:
        grant_id = f"gra_{random_digits(_ID_DIGITS)}"
        row = await transaction.fetch_row(
            "keep_oauth_grant", grant_id, user.user_id, client.row_id, code.resource, code.scopes, code.is_test, now,
            user.via_key,
        )  # fmt: skip
        if row is None:
            raise ConsentRefused("service_client")
        return str(row["id"])


def _login(user: ConsentingUser) -> tuple[str | None, ...]:
    return (user.user_id, user.via_key, user.via_issuer, user.via_subject)


def _actor(user_id: str) -> str:
    return f"user:{user_id}"
