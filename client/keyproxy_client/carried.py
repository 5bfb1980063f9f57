"""The acting user as values of a message, and back. A queue may change, drop or spell them otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from keyproxy_client.acting import Acting

_MODES: Final[Mapping[object, bool]] = {True: True, False: False, "true": True, "false": False}


def acting_of(user: object, tenant: object, test: object) -> Acting | None:
    """The acting user that these values name; None if they name none, or if one of them is invalid."""
    is_test = _MODES.get(test) if isinstance(test, bool | str) else None
    if not isinstance(user, str) or not isinstance(tenant, str | None) or is_test is None:
        return None
    try:
        return Acting(user, tenant, is_test)
    except ValueError:
        return None
