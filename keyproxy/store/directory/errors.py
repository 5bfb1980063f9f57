"""The refusals of directory operations."""

from __future__ import annotations


class DirectoryError(Exception):
    """The operation was refused, or its subject does not exist. The text explains it in one sentence."""


class NotFound(DirectoryError):
    """It does not exist, or is outside the tenant that this directory is bound to."""


class Invalid(DirectoryError):
    """An argument is invalid: an id, a name, a scope, a limit."""


class Conflict(DirectoryError):
    """Its state does not allow the operation: already revoked, in use, owned by another user or tenant."""


class NotPermitted(DirectoryError):
    """The actor may see it, but not decide on it."""


class DelegationRefused(DirectoryError):
    """The agent token would exceed the authority of the key or user that it is for."""


class TooManyTokens(DirectoryError):
    """The key has as many live agent tokens as it may have."""


class Outdated(DirectoryError):
    """It has changed since the caller read it: its ETag differs."""
