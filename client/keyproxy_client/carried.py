"""The acting user as values of a message, and back. A queue may change, drop or spell them otherwise."""

from __future__ import annotations

from keyproxy_client.acting import Acting


def acting_of(user: object, tenant: object, test: object) -> Acting | None:
    """The acting user that these values name; None if they name none, or if one of them is invalid."""
    if test is False or test == "false":
        is_test = False
    elif test is True or test == "true":
        is_test = True
    else:
        return None
    if not isinstance(user, str) or not (tenant is None or isinstance(tenant, str)):
        return None
    try:
        return Acting(user, tenant, is_test)
    except ValueError:
        return None
