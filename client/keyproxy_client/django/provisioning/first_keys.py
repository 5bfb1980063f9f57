"""What happens with the first key of a user: it becomes a credential, and the application receives it once."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

from django.contrib.auth import get_user_model
from django.db import IntegrityError, connections, router, transaction
from django.views.decorators.debug import sensitive_variables

from keyproxy_client.django.directory.interface import IssuedKey, KeyWish
from keyproxy_client.django.models import Credential
from keyproxy_client.django.settings import settings
from keyproxy_client.django.signals import key_issued


def wish() -> KeyWish | None:
    """The first key of a new user; None if it gets none."""
    found = settings()
    if not found.issues_first_key:
        return None
    return KeyWish(scopes=found.scopes, life=timedelta(days=found.key_days) if found.key_days else None)


@sensitive_variables("key")
def hand_out(user: Any, key: IssuedKey, using: str) -> None:
    """Keep a key as the user's credential, if those are per user, and send `key_issued` after the commit."""
    keep(user, key)

    def send_after_commit() -> None:
        send(user, key)

    transaction.on_commit(send_after_commit, using=using)


@sensitive_variables("key")
def keep(user: Any, key: IssuedKey) -> None:
    """Seal a key as the user's credential, with `CREDENTIALS` "per_user", unless its first call has issued one."""
    if settings().credentials != "per_user":
        return
    from keyproxy_client.django import credentials

    alias = router.db_for_write(Credential)
    connection = connections[alias]
    if connection.in_atomic_block and connection.features.supports_ignore_conflicts:
        # One statement of the sign-up, not three with a savepoint.
        Credential.objects.using(alias).bulk_create([credentials.sealed(user, key)], ignore_conflicts=True)
        return
    scope = transaction.atomic(using=alias) if connection.in_atomic_block else contextlib.nullcontext()
    with contextlib.suppress(IntegrityError), scope:
        credentials.keep(user, key)


@sensitive_variables("key")
def send(user: Any, key: IssuedKey) -> list[Exception]:
    """Send `key_issued`, and return what receivers raised. One that fails prevents no other."""
    results = key_issued.send_robust(sender=get_user_model(), user=user, key_id=key.key_id, secret=key.secret)
    return [result for _, result in results if isinstance(result, Exception)]
