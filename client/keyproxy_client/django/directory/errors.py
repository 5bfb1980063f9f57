"""Why the directory did not perform an operation. No message contains a secret."""

from __future__ import annotations


class DirectoryError(Exception):
    """An operation of the directory failed. `code`: the refusal's code in the admin API, or one of this package."""

    code = "directory_error"

    def __init__(self, text: str, *, code: str = "") -> None:
        super().__init__(text)
        if code:
            self.code = code


class DirectoryUnavailable(DirectoryError):
    """keyproxy's schema or admin API did not respond. The operation may have been performed; it can be repeated."""

    code = "directory_unavailable"


class DirectoryRefused(DirectoryError):
    """keyproxy refuses the operation, and would refuse a repetition: a missing tenant, right or scope, invalid values."""

    code = "directory_refused"


class NotInDirectory(DirectoryRefused):
    """The user, key or tenant does not exist in keyproxy."""

    code = "not_found"


class KeyConflict(DirectoryRefused):
    """The state of a key does not allow the operation: it is revoked, has expired, or has a working successor."""

    code = "conflict"


class ProvisionConflict(DirectoryRefused):
    """The user's id exists in keyproxy and belongs to another tenant."""

    code = "conflict"


class KeyLimitReached(DirectoryRefused):
    """The user has `KEYS_PER_USER_MAX` working keys."""

    code = "key_limit_reached"


class AlreadyIssued(DirectoryRefused):
    """A request with the same id was performed before; its secret is not stored. `key_id`: of that key."""

    code = "already_issued"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"this request has issued a key already{': ' + key_id if key_id else ''}")
        self.key_id = key_id
