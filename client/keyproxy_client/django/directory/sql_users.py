"""Users in keyproxy's schema, by statements on a connection of Django.

Each change is one statement, which sets its author for keyproxy's audit log first. In a transaction of the application
another one clears the author, so that what the application changes next is recorded under its database role.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from django.db import DatabaseError, connections, transaction
from django.views.decorators.debug import sensitive_variables

from keyproxy_client import keys
from keyproxy_client.django.directory.errors import DirectoryUnavailable, NotInDirectory, ProvisionConflict
from keyproxy_client.django.directory.interface import Created, DirectoryUser, IssuedKey, KeyWish, SignUp, id_of_request
from keyproxy_client.django.directory.sql_connection import is_in_transaction, sqlstate, translated

_FOREIGN_KEY_VIOLATION: Final = "23503"
_LOST: Final = "its secret was lost"

#: Local to the transaction. The statements read from it, so that PostgreSQL evaluates it before triggers run.
_ACTOR: Final = "actor AS MATERIALIZED (SELECT set_config('keyproxy.actor', %(actor)s::text, true) AS name)"

# The user and its first key, or neither, and once under concurrency. An existing user yields its tenant instead; if
# another transaction has just created it, this statement's snapshot does not contain it and there is no row at all.
_CREATE: Final = f"""
    WITH {_ACTOR}, made AS (
        INSERT INTO keyproxy.users (id, tenant_id)
        SELECT %(user)s::text, %(tenant)s::text FROM actor WHERE name IS NOT NULL
        ON CONFLICT (id) DO NOTHING
        RETURNING id
    ), issued AS (
        INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, name, scopes, is_test, expires_at)
        SELECT %(key)s::text, made.id, %(digest)s::bytea, %(hint)s::text, %(name)s::text, %(scopes)s::text[], false,
               now() + %(life)s::interval
        FROM made WHERE %(key)s::text IS NOT NULL
        RETURNING expires_at
    )
    SELECT true, %(tenant)s::text, false, (SELECT expires_at FROM issued) FROM made
    UNION ALL
    SELECT false, u.tenant_id, u.disabled_at IS NOT NULL, NULL FROM keyproxy.users AS u WHERE u.id = %(user)s::text
"""  # noqa: S608 - a constant

_GET: Final = (
    "SELECT false, u.tenant_id, u.disabled_at IS NOT NULL, NULL::timestamptz FROM keyproxy.users AS u WHERE u.id = %s"
)

_DISABLE: Final = f"""
    WITH {_ACTOR}
    UPDATE keyproxy.users AS u SET disabled_at = now() FROM actor
    WHERE actor.name IS NOT NULL AND u.id = %(user)s AND u.tenant_id = %(tenant)s AND u.disabled_at IS NULL
"""  # noqa: S608

_ENABLE: Final = f"""
    WITH {_ACTOR}
    UPDATE keyproxy.users AS u SET disabled_at = NULL FROM actor
    WHERE actor.name IS NOT NULL AND u.id = %(user)s AND u.tenant_id = %(tenant)s AND u.disabled_at IS NOT NULL
"""  # noqa: S608

_DELETE: Final = f"""
    WITH {_ACTOR}
    DELETE FROM keyproxy.users AS u USING actor
    WHERE actor.name IS NOT NULL AND u.id = %(user)s AND u.tenant_id = %(tenant)s
"""  # noqa: S608

# A first key whose secret was lost between two databases: the id of the sign-up identifies it.
_REVOKE_LOST: Final = f"""
    WITH {_ACTOR}
    UPDATE keyproxy.api_keys AS k SET revoked_at = now(), revoke_reason = '{_LOST}' FROM actor
    WHERE actor.name IS NOT NULL AND k.id = %(key)s AND k.user_id = %(user)s AND k.revoked_at IS NULL
"""  # noqa: S608

_ISSUE: Final = f"""
    WITH {_ACTOR}
    INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, name, scopes, is_test, expires_at)
    SELECT %(key)s, %(user)s, %(digest)s::bytea, %(hint)s, %(name)s, %(scopes)s::text[], false, now() + %(life)s::interval
    FROM actor WHERE name IS NOT NULL
    RETURNING expires_at
"""  # noqa: S608

_CLEAR: Final = "SELECT set_config('keyproxy.actor', '', true)"

# Needs: users (id), or users (tenant_id).
_PAGE: Final = """
    SELECT u.id, u.tenant_id, u.disabled_at IS NOT NULL FROM keyproxy.users AS u
    WHERE u.id > %(after)s AND (%(tenant)s::text IS NULL OR u.tenant_id = %(tenant)s::text)
    ORDER BY u.id LIMIT %(size)s
"""


@dataclass(frozen=True, slots=True)
class SqlUsers:
    """The users of keyproxy on the connection `alias`."""

    alias: str
    key_prefix: str

    @sensitive_variables("secret", "values")
    def create(
        self, user: str, tenant: str, *, actor: str, first_key: KeyWish | None = None, sign_up: SignUp | None = None
    ) -> Created:
        """See Users."""
        secret, values = None, dict.fromkeys(("key", "digest", "hint", "name", "scopes", "life"))
        if first_key is not None:
            secret = keys.make(is_test=False, prefix=self.key_prefix)
            values = self._key_values(secret, first_key, id_of_request(sign_up.id) if sign_up else keys.new_key_id())
        with self._cursor(is_changing=True) as cursor:
            try:
                cursor.execute(_CREATE, {"actor": actor, "user": user, "tenant": tenant, **values})
            except DatabaseError as error:
                if sqlstate(error) == _FOREIGN_KEY_VIOLATION:
                    raise NotInDirectory(f"there is no tenant {tenant!r} in keyproxy: create it first") from error
                raise
            row = cursor.fetchone()
            if row is None:
                cursor.execute(_GET, [user])
                row = cursor.fetchone()
        if row is None:
            raise DirectoryUnavailable(f"user {user!r} was created and deleted by another transaction: repeat")
        is_new, owner, is_disabled, expires_at = row
        if owner != tenant:
            raise ProvisionConflict(f"user {user!r} exists in keyproxy and belongs to another tenant")
        made = DirectoryUser(user, tenant, is_disabled)
        if first_key is None or secret is None:
            return Created(made, is_new)
        if is_new:
            return Created(made, is_new, _issued(values, user, expires_at, secret))
        if sign_up is None or not sign_up.is_repeated:
            return Created(made, is_new)
        return Created(made, is_new, self._replace_lost(user, first_key, sign_up, actor))

    def disable(self, user: str, tenant: str, *, actor: str) -> bool:
        """See Users."""
        return self._change(_DISABLE, user, tenant, actor) or self._exists(user, tenant)

    def enable(self, user: str, tenant: str, *, actor: str) -> bool:
        """See Users."""
        return self._change(_ENABLE, user, tenant, actor) or self._exists(user, tenant)

    def delete(self, user: str, tenant: str, *, actor: str) -> bool:
        """See Users."""
        return self._change(_DELETE, user, tenant, actor)

    def pages(self, tenant: str | None = None, *, size: int = 500) -> Iterator[list[DirectoryUser]]:
        """See Users."""
        after = ""
        while True:
            with self._cursor(is_changing=False) as cursor:
                cursor.execute(_PAGE, {"after": after, "tenant": tenant, "size": size})
                page = [DirectoryUser(*row) for row in cursor.fetchall()]
            if page:
                yield page
            if len(page) < size:
                return
            after = page[-1].id

    @sensitive_variables("secret", "values")
    def _replace_lost(self, user: str, wish: KeyWish, sign_up: SignUp, actor: str) -> IssuedKey | None:
        """If this sign-up issued a key before, its secret is lost: revoke it and issue another."""
        with transaction.atomic(using=self.alias), self._cursor(is_changing=True) as cursor:
            cursor.execute(_REVOKE_LOST, {"actor": actor, "user": user, "key": id_of_request(sign_up.id)})
            if cursor.rowcount == 0:
                return None
            secret = keys.make(is_test=False, prefix=self.key_prefix)
            values = self._key_values(secret, wish, keys.new_key_id())
            cursor.execute(_ISSUE, {"actor": actor, "user": user, **values})
            return _issued(values, user, cursor.fetchone()[0], secret)

    def _key_values(self, secret: str, wish: KeyWish, key_id: str) -> dict[str, Any]:
        return {
            "key": key_id,
            "digest": keys.digest(secret),
            "hint": keys.hint(secret, prefix=self.key_prefix),
            "name": wish.name,
            "scopes": list(dict.fromkeys(wish.scopes)),
            "life": wish.life,
        }

    def _change(self, statement: str, user: str, tenant: str, actor: str) -> bool:
        with self._cursor(is_changing=True) as cursor:
            cursor.execute(statement, {"actor": actor, "user": user, "tenant": tenant})
            return bool(cursor.rowcount)

    def _exists(self, user: str, tenant: str) -> bool:
        with self._cursor(is_changing=False) as cursor:
            cursor.execute(_GET, [user])
            row = cursor.fetchone()
        return row is not None and row[1] == tenant

    @contextmanager
    def _cursor(self, *, is_changing: bool) -> Iterator[Any]:
        """A cursor. After a change in a transaction, the author is cleared; after one alone, PostgreSQL has done that."""
        with translated(), connections[self.alias].cursor() as cursor:
            yield cursor
            if is_changing and is_in_transaction(self.alias):
                cursor.execute(_CLEAR)


def _issued(values: dict[str, Any], user: str, expires_at: Any, secret: str) -> IssuedKey:
    return IssuedKey(values["key"], user, False, expires_at, secret, tuple(values["scopes"]))
