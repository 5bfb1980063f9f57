"""Keys in keyproxy's schema, by statements on a connection of Django.

The role of the application reads neither digests nor the plan, the roles or the delegation of a key: a key that it
issues has none of these. When it rotates a key, a trigger of keyproxy keeps the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from django.db import connections, transaction
from django.views.decorators.debug import sensitive_variables

from keyproxy_client import keys
from keyproxy_client.django.directory.errors import (
    AlreadyIssued,
    KeyConflict,
    KeyLimitReached,
    NotInDirectory,
    ProvisionConflict,
)
from keyproxy_client.django.directory.interface import DirectoryKey, IssuedKey, KeyWish, id_of_request
from keyproxy_client.django.directory.sql_connection import translated

_COLUMNS: Final = (
    "id, user_id, hint, name, scopes, is_test, created_at, expires_at, revoked_at, revoke_reason, replaces,"
    " last_used_at"
)

# A lock on the user serialises issues of its keys, so that the count that follows sees all of them.
_HOLD_USER: Final = "SELECT tenant_id FROM keyproxy.users WHERE id = %s FOR NO KEY UPDATE"

_COUNT: Final = """
    SELECT count(*) FILTER (WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())),
           coalesce(bool_or(id = %s), false)
    FROM keyproxy.api_keys WHERE user_id = %s
"""

_INSERT: Final = """
    INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, name, scopes, is_test, expires_at, replaces)
    VALUES (%s, %s, %s, %s, %s, %s::text[], %s, now() + %s::interval, %s)
    RETURNING expires_at
"""

_HOLD_KEY: Final = """
    SELECT user_id, name, scopes, is_test, expires_at IS NOT NULL, revoked_at IS NOT NULL,
           coalesce(expires_at <= now(), false)
    FROM keyproxy.api_keys WHERE id = %s FOR NO KEY UPDATE
"""

_SUCCESSOR: Final = """
    SELECT id, id = %(new)s FROM keyproxy.api_keys
    WHERE replaces = %(old)s
      AND (id = %(new)s OR revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now()))
    ORDER BY id = %(new)s DESC LIMIT 1
"""

_RETIRE: Final = """
    UPDATE keyproxy.api_keys SET expires_at = least(expires_at, now() + %s::interval) WHERE id = %s
    RETURNING expires_at
"""

_REVOKE: Final = """
    UPDATE keyproxy.api_keys SET revoked_at = now(), revoke_reason = left(%s, 500) WHERE id = %s AND revoked_at IS NULL
"""


_OF_USER: Final = f"""
    SELECT {_COLUMNS} FROM keyproxy.api_keys
    WHERE user_id = (SELECT u.id FROM keyproxy.users AS u WHERE u.id = %s AND u.tenant_id = %s)
    ORDER BY created_at DESC, id
"""  # noqa: S608 - a constant

_GET: Final = f"SELECT {_COLUMNS} FROM keyproxy.api_keys WHERE id = %s"  # noqa: S608


@dataclass(frozen=True, slots=True)
class SqlKeys:
    """The keys of keyproxy on the connection `alias`. A user has at most `keys_max` working ones when one is issued."""

    alias: str
    key_prefix: str
    keys_max: int

    @sensitive_variables("secret", "values")
    def issue(self, user: str, tenant: str, wish: KeyWish, *, actor: str, request: str = "") -> IssuedKey:
        """See Keys."""
        key_id = id_of_request(request) if request else keys.new_key_id()
        with self._changing(actor) as cursor:
            cursor.execute(_HOLD_USER, [user])
            owner = cursor.fetchone()
            if owner is None:
                raise NotInDirectory(f"there is no user {user!r} in keyproxy")
            if owner[0] != tenant:
                raise ProvisionConflict(f"user {user!r} exists in keyproxy and belongs to another tenant")
            cursor.execute(_COUNT, [key_id, user])
            working, is_repeated = cursor.fetchone()
            if is_repeated:
                raise AlreadyIssued(key_id)
            if working >= self.keys_max:
                raise KeyLimitReached(f"user {user!r} has {working} working keys; KEYS_PER_USER_MAX is {self.keys_max}")
            return self._insert(cursor, key_id, user, wish, replaces=None)

    @sensitive_variables("issued")
    def rotate(
        self, key_id: str, *, grace: timedelta, life: timedelta | None, actor: str, request: str = ""
    ) -> IssuedKey:
        """See Keys. A key that never expires is replaced by one that never expires."""
        new_id = id_of_request(request) if request else keys.new_key_id()
        with self._changing(actor) as cursor:
            cursor.execute(_HOLD_KEY, [key_id])
            row = cursor.fetchone()
            if row is None:
                raise NotInDirectory(f"there is no key {key_id!r} in keyproxy")
            user, name, scopes, is_test, expires, is_revoked, is_expired = row
            cursor.execute(_SUCCESSOR, {"new": new_id, "old": key_id})
            successor = cursor.fetchone()
            if successor is not None and successor[1]:
                raise AlreadyIssued(new_id)
            if is_revoked or is_expired:
                raise KeyConflict(f"key {key_id!r} {'was revoked' if is_revoked else 'has expired'}: issue a new one")
            if successor is not None:
                raise KeyConflict(f"key {key_id!r} was rotated already: {successor[0]!r} replaces it")
            wish = KeyWish(name, scopes, is_test, life if expires else None)
            issued = self._insert(cursor, new_id, user, wish, replaces=key_id)
            cursor.execute(_RETIRE, [grace, key_id])
            (old_expires_at,) = cursor.fetchone()
            return IssuedKey(
                issued.key_id, user, is_test, issued.expires_at, issued.secret, issued.scopes, old_expires_at
            )

    def revoke(self, key_id: str, reason: str, *, actor: str) -> DirectoryKey:
        """See Keys."""
        with self._changing(actor) as cursor:
            cursor.execute(_REVOKE, [reason, key_id])
            cursor.execute(_GET, [key_id])
            row = cursor.fetchone()
        if row is None:
            raise NotInDirectory(f"there is no key {key_id!r} in keyproxy")
        return _key(row)

    def of_user(self, user: str, tenant: str) -> list[DirectoryKey]:
        """See Keys."""
        with translated(), connections[self.alias].cursor() as cursor:
            cursor.execute(_OF_USER, [user, tenant])
            return [_key(row) for row in cursor.fetchall()]

    @sensitive_variables("secret")
    def _insert(self, cursor: Any, key_id: str, user: str, wish: KeyWish, *, replaces: str | None) -> IssuedKey:
        secret = keys.make(is_test=wish.is_test, prefix=self.key_prefix)
        scopes = list(dict.fromkeys(wish.scopes))
        hint = keys.hint(secret, prefix=self.key_prefix)
        shown = [hint, wish.name, scopes, wish.is_test, wish.life, replaces]
        cursor.execute(_INSERT, [key_id, user, keys.digest(secret), *shown])
        (expires_at,) = cursor.fetchone()
        return IssuedKey(key_id, user, wish.is_test, expires_at, secret, tuple(scopes))

    @contextmanager
    def _changing(self, actor: str) -> Iterator[Any]:
        """A cursor in a transaction or savepoint whose changes have this author in keyproxy's audit log.

        The author is cleared again, because the transaction may be the application's and change more.
        """
        with translated(), transaction.atomic(using=self.alias), connections[self.alias].cursor() as cursor:
            cursor.execute("SELECT set_config('keyproxy.actor', %s, true)", [actor])
            yield cursor
            cursor.execute("SELECT set_config('keyproxy.actor', '', true)")


def _key(row: tuple[Any, ...]) -> DirectoryKey:
    key_id, user, hint, name, scopes, *rest = row
    return DirectoryKey(key_id, user, hint, name, tuple(scopes), *rest)
