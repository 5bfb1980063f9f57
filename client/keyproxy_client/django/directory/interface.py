"""The operations on users and keys in keyproxy, which SQL and the admin API implement.

By SQL they are statements on a connection of Django, in the transaction that is open there; by the admin API they are
requests. Every operation can be repeated: repeated, it changes nothing, except that issuing makes another key. Each
raises DirectoryError and its kinds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Protocol

from keyproxy_client.keys import base62

#: The authors of changes in the audit log of keyproxy. The admin API records the token instead.
ACTOR_SIGNUP: Final = "django:signup"
ACTOR_DELETE: Final = "django:delete"
ACTOR_SYNC: Final = "django:sync"
ACTOR_ROTATE: Final = "django:rotate"

#: As keyproxy makes ids.
_KEY_ID_DIGITS: Final = 20


def actor_of_admin(pk: object) -> str:
    """The author of a change that a user of Django's admin made."""
    return f"django:admin:{pk}"


def id_of_request(request: str) -> str:
    """The id of the key that a request issues: the primary key recognises a repetition."""
    return "key_" + base62(int.from_bytes(hashlib.sha256(request.encode()).digest(), "big"), _KEY_ID_DIGITS)


@dataclass(frozen=True, slots=True)
class DirectoryUser:
    """A user in keyproxy."""

    id: str
    tenant: str
    is_disabled: bool = False


@dataclass(frozen=True, slots=True)
class DirectoryKey:
    """A key in keyproxy, without its secret, which is not stored."""

    id: str
    user: str
    hint: str
    name: str
    scopes: tuple[str, ...]
    is_test: bool
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    revoke_reason: str | None = None
    replaces: str | None = None
    last_used_at: datetime | None = None

    def works_at(self, now: datetime) -> bool:
        """Whether the key is neither revoked nor expired at this time."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)


@dataclass(frozen=True, slots=True)
class KeyWish:
    """The properties of a new key. `life` None: it never expires."""

    name: str = ""
    scopes: Sequence[str] = ()
    is_test: bool = False
    life: timedelta | None = None


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key that was just issued. `secret` is its plaintext: it exists only here, and no repr shows it.

    `old_expires_at`: when the key that this one replaces expires.
    """

    key_id: str
    user: str
    is_test: bool
    expires_at: datetime | None
    secret: str = field(repr=False)
    scopes: tuple[str, ...] = ()
    old_expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Created:
    """The result of creating a user. `is_new` is False if it existed. `key` is the first key, if one was issued now."""

    user: DirectoryUser
    is_new: bool
    key: IssuedKey | None = None


@dataclass(frozen=True, slots=True)
class SignUp:
    """A sign-up that may be repeated: what identifies it, when it was written, and whether another attempt began before.

    If the response to that attempt was lost, so was the secret of the first key.
    """

    id: str
    written_at: datetime
    is_repeated: bool


class Users(Protocol):
    """The users of keyproxy. `actor`: the author of a change, for the audit log of keyproxy."""

    def create(
        self, user: str, tenant: str, *, actor: str, first_key: KeyWish | None = None, sign_up: SignUp | None = None
    ) -> Created:
        """Create a user, with a first live key if `first_key` is given; an existing user stays unchanged, without a key.

        If an earlier attempt of the same `sign_up` issued the first key, that key is revoked and another issued. Raises
        ProvisionConflict if the id belongs to another tenant, and NotInDirectory if there is no such tenant.
        """
        ...

    def disable(self, user: str, tenant: str, *, actor: str) -> bool:
        """Disable a user of the tenant, and return whether it exists. It keeps the time of an earlier disabling."""
        ...

    def enable(self, user: str, tenant: str, *, actor: str) -> bool:
        """Enable a user of the tenant, and return whether it exists."""
        ...

    def delete(self, user: str, tenant: str, *, actor: str) -> bool:
        """Delete a user of the tenant with its keys, and return whether it existed."""
        ...

    def pages(self, tenant: str | None = None, *, size: int = 500) -> Iterator[list[DirectoryUser]]:
        """All users, or those of one tenant, by id, in pages that are read when they are needed.

        The admin API requires the scope keys:read for users of all tenants.
        """
        ...


class Keys(Protocol):
    """The keys of keyproxy. `actor`: as for Users."""

    def issue(self, user: str, tenant: str, wish: KeyWish, *, actor: str, request: str = "") -> IssuedKey:
        """Issue a key. `request` identifies the request, so that its repetition issues no second key.

        Raises NotInDirectory if there is no such user, ProvisionConflict if it belongs to another tenant,
        KeyLimitReached if it has `KEYS_PER_USER_MAX` working keys, and AlreadyIssued if the request was performed before.
        """
        ...

    def rotate(
        self, key_id: str, *, grace: timedelta, life: timedelta | None, actor: str, request: str = ""
    ) -> IssuedKey:
        """Replace a key. The old one works for `grace` longer, or until its expiry if that is sooner.

        The new key has the user, name, scopes and mode of the old one, and its `life`. Raises NotInDirectory,
        KeyConflict if the key is revoked, has expired, or has a working successor, and AlreadyIssued like `issue`.
        """
        ...

    def revoke(self, key_id: str, reason: str, *, actor: str) -> DirectoryKey:
        """Revoke a key permanently and return it. A revoked key keeps its time and reason. Raises NotInDirectory."""
        ...

    def of_user(self, user: str, tenant: str) -> list[DirectoryKey]:
        """All keys of a user of the tenant, the newest first. The admin API requires the scope keys:read."""
        ...


@dataclass(frozen=True, slots=True)
class Directory:
    """The users and keys of keyproxy, over one of the two ways to it."""

    users: Users
    keys: Keys
