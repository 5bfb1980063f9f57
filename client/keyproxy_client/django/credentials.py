"""Per-user credentials (`CREDENTIALS = "per_user"`): the keys with which background work calls keyproxy as its users.

The secret is sealed in a row of Django's database, one current row per user and mode. A row is retired when its key is
replaced, and deleted when that key has expired.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.db import IntegrityError, connections, router, transaction
from django.utils import timezone

from keyproxy_client.acting import Acting
from keyproxy_client.django import sealing
from keyproxy_client.django.directory.errors import AlreadyIssued, KeyConflict, NotInDirectory
from keyproxy_client.django.directory.interface import ACTOR_ROTATE, ACTOR_SIGNUP, Directory, IssuedKey
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.models import Credential
from keyproxy_client.django.provisioning.issuing import issue_for, key_life
from keyproxy_client.django.settings import settings
from keyproxy_client.django.users import tenant_of, user_of_id

#: The name of these keys in keyproxy.
KEY_NAME: Final = "django credential"


#: So many runs in a row may lose the secret of a successor. Then a new key is issued, which replaces none.
_LOST_MAX: Final = 16


class NoCredential(LookupError):
    """The acting user has no account in Django, or an inactive one, so that there is no key to call keyproxy with."""


def sealed(user: Any, issued: IssuedKey) -> Credential:
    """The row, not stored yet, of a key that was just issued."""
    return Credential(
        user=user,
        key_id=issued.key_id,
        is_test=issued.is_test,
        sealed=sealing.seal(user.pk, issued.key_id, issued.secret),
        expires_at=issued.expires_at,
    )


def keep(user: Any, issued: IssuedKey) -> Credential:
    """Store a key that was just issued as the current credential of its user and mode."""
    row = sealed(user, issued)
    row.save(force_insert=True)
    return row


def secret_for(acting: Acting) -> str:
    """The secret of the key with which to call keyproxy as this user, in its mode; issues the key if there is none.

    Raises NoCredential, CredentialUnusable or DirectoryError.
    """
    user = user_of_id(acting.user)
    if user is None or not getattr(user, "is_active", True):
        raise NoCredential(f"{acting.user!r} is not the id of an active user of this project")
    if acting.tenant is not None and tenant_of(user) != acting.tenant:
        raise NoCredential(f"user {acting.user!r} belongs to a tenant other than {acting.tenant!r}")
    row = _current(user, is_test=acting.is_test)
    if row is None or _has_expired(row):
        row = _issued(user, is_test=acting.is_test)
    return sealing.unseal(row.sealed, user.pk, row.key_id)


#: The same for coroutines: Django's database connections belong to its own thread.
secret_for_async = sync_to_async(secret_for, thread_sensitive=True)


def is_due(row: Credential, now: datetime) -> bool:
    """Whether a credential is past half its life. One that never expires is never due."""
    return row.expires_at is not None and now >= row.issued_at + (row.expires_at - row.issued_at) / 2


def rotate(row: Credential, grace: timedelta) -> Credential | None:
    """Replace the key of a current credential, and return the new credential; None if another process replaced it.

    By SQL, the new key, the expiry of the old one and the credential commit together. By the admin API, a crash between
    the response and the commit loses the new secret: the next run revokes that key and issues another.
    """
    with _transaction():
        current = Credential.objects.select_for_update().filter(pk=row.pk, retired_at=None).first()
        if current is None:
            return None
        issued = _replacement(directory(), current, grace)
        current.retired_at = timezone.now()
        current.expires_at = issued.old_expires_at or current.expires_at
        current.save(update_fields=["retired_at", "expires_at"])
        return keep(current.user, issued)


def delete_expired() -> int:
    """Delete retired credentials whose keys have expired, and return their number."""
    return Credential.objects.filter(retired_at__isnull=False, expires_at__lte=timezone.now()).delete()[0]


def needs_resealing(row: Credential) -> bool:
    """Whether a credential is encrypted under another than the first Fernet key. Raises CredentialUnusable."""
    return sealing.resealed(row.sealed, row.key_id) is not None


def reseal(row: Credential) -> bool:
    """Encrypt a credential under the first Fernet key, and return whether it was not. Raises CredentialUnusable."""
    sealed = sealing.resealed(row.sealed, row.key_id)
    # A row that was replaced in the meantime is sealed under the first key already.
    return sealed is not None and Credential.objects.filter(pk=row.pk, sealed=row.sealed).update(sealed=sealed) == 1


def _replacement(found: Directory, current: Credential, grace: timedelta) -> IssuedKey:
    life = key_life()
    # The admin API refuses the identification of a request that had other values.
    values = f"{grace.total_seconds():.0f}.{life.total_seconds() if life else 0:.0f}"
    request = f"credential.{current.key_id}.{values}"
    with suppress(KeyConflict, NotInDirectory):
        # The old key may be revoked, expired, deleted, or have a successor whose secret is unknown here.
        for _ in range(_LOST_MAX):
            try:
                return found.keys.rotate(current.key_id, grace=grace, life=life, actor=ACTOR_ROTATE, request=request)
            except AlreadyIssued as error:
                if not error.key_id:
                    raise
                # An earlier run lost the secret of this successor, whose id identifies the next attempt.
                found.keys.revoke(error.key_id, "its secret was lost", actor=ACTOR_ROTATE)
                request = f"credential.{error.key_id}.{values}"
    return issue_for(current.user, actor=ACTOR_ROTATE, name=KEY_NAME, scopes=settings().scopes, is_test=current.is_test)


def _issued(user: Any, *, is_test: bool) -> Credential:
    """A new credential, or the one that another process stored meanwhile."""
    issued: IssuedKey | None = None
    try:
        with _transaction() as alias:
            _hold(user, alias)
            row = _current(user, is_test=is_test)
            if row is not None and not _has_expired(row):
                return row
            if row is not None:
                Credential.objects.filter(pk=row.pk).update(retired_at=timezone.now())
            issued = issue_for(user, actor=ACTOR_SIGNUP, name=KEY_NAME, scopes=settings().scopes, is_test=is_test)
            return keep(user, issued)
    except IntegrityError:
        # A database without row locks.
        row = _current(user, is_test=is_test)
        if row is None:
            raise
        if issued is not None and settings().backend == "api":
            # By SQL the rollback removed the key.
            directory().keys.revoke(issued.key_id, "another process issued a credential", actor=ACTOR_SIGNUP)
        return row


def _hold(user: Any, alias: str) -> None:
    """Lock the user until the transaction ends, so that several processes issue one credential, not one each."""
    features = connections[alias].features
    if features.has_select_for_update:
        rows = type(user)._default_manager.using(alias).filter(pk=user.pk)
        # Without the key: rows that refer to the user can be added meanwhile.
        rows.select_for_update(no_key=features.has_select_for_no_key_update).first()


def _current(user: Any, *, is_test: bool) -> Credential | None:
    return Credential.objects.filter(user=user, is_test=is_test, retired_at=None).first()


def _has_expired(row: Credential) -> bool:
    return row.expires_at is not None and row.expires_at <= timezone.now()


@contextmanager
def _transaction() -> Iterator[str]:
    """One transaction on the databases of the credentials, whose alias it yields, and of keyproxy, usually the same."""
    alias = router.db_for_write(Credential)
    with transaction.atomic(using=alias):
        if settings().backend == "sql" and settings().database != alias:
            with transaction.atomic(using=settings().database):
                yield alias
        else:
            yield alias
