"""The authenticated user of a request, as the acting user of outgoing requests: looked up only when one is made."""

from __future__ import annotations

import logging
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.utils.functional import LazyObject

from keyproxy_client.acting import Acting
from keyproxy_client.django.users import InvalidId, keyproxy_id, tenant_of

_log: Final = logging.getLogger("keyproxy_client.django")


def acting_user(user: Any) -> Acting:
    """The user of keyproxy that a user of Django is. Raises InvalidId, and TypeError for another object."""
    if not hasattr(user, "pk"):
        raise TypeError(f"acting_as expects a user or the id of a keyproxy user, not {type(user).__name__}")
    return Acting(keyproxy_id(user), tenant_of(user))


def look_up(request: Any) -> Acting | None:
    """The authenticated user of a request; None if it is anonymous.

    DRF sets the user of Django's request when it authenticates. In a coroutine Django refuses the query for a user that
    `await request.auser()` has not loaded.
    """
    return _of(_loaded(request) or getattr(request, "user", None))


async def look_up_async(request: Any) -> Acting | None:
    """Like `look_up`, in an event loop, which nothing blocks."""
    user = _loaded(request)
    if user is None and hasattr(request, "auser"):
        user = await request.auser()
    # USER_ID and TENANT may be functions that read the database.
    return None if user is None else await sync_to_async(_of)(user)


def _loaded(request: Any) -> Any:
    """The user, if no query is needed to know it."""
    user = request.__dict__.get("user")
    if user is not None and not isinstance(user, LazyObject):
        return user
    return getattr(request, "_acached_user", None) or getattr(request, "_cached_user", None)


def _of(user: Any) -> Acting | None:
    if user is None or not user.is_authenticated:
        return None
    try:
        return acting_user(user)
    except InvalidId as error:
        # A request that needs an acting user fails with NoActingUser, which does not give the reason.
        _log.warning("the user of a request cannot act: %s", error)
        return None
