"""Issue a key for a user of Django, by whichever way the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from django.views.decorators.debug import sensitive_variables

from keyproxy_client.django.directory.errors import NotInDirectory
from keyproxy_client.django.directory.interface import IssuedKey, KeyWish
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.settings import settings
from keyproxy_client.django.users import keyproxy_id, tenant_of

_BY_SETTINGS: Final = timedelta(0)


def key_life() -> timedelta | None:
    """The life of a new key by `KEY_DAYS`; None: it never expires."""
    days = settings().key_days
    return timedelta(days=days) if days else None


@sensitive_variables("issued")
def issue_for(
    user: Any,
    *,
    actor: str,
    name: str = "",
    scopes: Sequence[str] = (),
    is_test: bool = False,
    life: timedelta | None = _BY_SETTINGS,
    request: str = "",
) -> IssuedKey:
    """Issue a key for a user, which is created in keyproxy if it is missing there, unless `PROVISION` is None.

    `life`: None: it never expires; by default that of the settings. Raises DirectoryError.
    """
    found, owner, tenant = directory(), keyproxy_id(user), tenant_of(user)
    wish = KeyWish(name, tuple(scopes), is_test, key_life() if life is _BY_SETTINGS else life)
    try:
        return found.keys.issue(owner, tenant, wish, actor=actor, request=request)
    except NotInDirectory:
        # A user that is created now would be enabled.
        if settings().provision is None or not getattr(user, "is_active", True):
            raise
        found.users.create(owner, tenant, actor=actor)
        return found.keys.issue(owner, tenant, wish, actor=actor, request=request)
