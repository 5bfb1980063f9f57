"""The check of each setting: it returns the value in its final form, or raises Fault.

No fault shows a value that may contain a secret: the value is shown by the caller, for settings that have none.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from keyproxy_client.incoming.peers import NetworkPeers
from keyproxy_client.names import is_id, is_scope

_HEADER_PREFIX: Final = re.compile(r"X-[A-Za-z0-9-]{1,40}-")
_KEY_PREFIX: Final = re.compile(r"[a-z][a-z0-9]{0,15}")
#: Header names with another meaning to keyproxy, which the prefix must not cover.
_TAKEN_NAMES: Final = ("x-forwarded-", "x-api-key", "x-request-id", "x-real-ip")

Check = Callable[[Any], Any]


class Fault(Exception):
    """What is wrong with a value, as a predicate."""


def one_of(*choices: str | None) -> Check:
    """One of these values."""

    def check(value: Any) -> Any:
        if value not in choices or isinstance(value, bool):
            raise Fault("must be " + " or ".join(repr(one) for one in choices))
        return value

    return check


def boolean(value: Any) -> bool:
    """True or False: a string such as "false" from the environment would count as true."""
    if not isinstance(value, bool):
        raise Fault("must be True or False")
    return value


def whole(low: int, high: int) -> Check:
    """A whole number between these bounds, both included."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Fault(f"must be a whole number from {low} to {high}")
        return value

    return check


def seconds(value: Any) -> float:
    """A time limit."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 60:
        raise Fault("must be a number of seconds, more than 0 and at most 60")
    return float(value)


def text(value: Any) -> str:
    """A string that is not empty, of printable ASCII."""
    if not isinstance(value, str) or not value or not value.isascii() or not value.isprintable():
        raise Fault("must be a string of printable ASCII characters")
    return value


def path(value: Any) -> str:
    """A path, or ""."""
    if not isinstance(value, str | os.PathLike):
        raise Fault("must be a path")
    found = os.fspath(value)
    if not isinstance(found, str) or "\0" in found:
        raise Fault("must be a path")
    return found


def key_path(value: Any) -> str:
    """The path of a service key, in which `{tenant}` may stand for the tenant's id."""
    found = path(value)
    if set(re.findall(r"\{[^}]*\}?|\}", found)) - {"{tenant}"}:
        raise Fault("may contain {tenant} and no other braces")
    return found


def url(value: Any) -> str:
    """A URL without credentials, query and fragment, or ""."""
    if value == "":
        return ""
    wrong = "must be a URL such as 'https://keyproxy.example:9443', without user, password, query and fragment"
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or " " in value:
        raise Fault(wrong)
    try:
        parts = urlsplit(value)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise Fault(wrong) from None
    if not is_address or "@" in parts.netloc or "?" in value or "#" in value:
        raise Fault(wrong)
    return value.rstrip("/")


def origin(value: Any) -> str:
    """The scheme, host and port of a server, or ""."""
    found = url(value)
    if urlsplit(found).path:
        raise Fault("must be scheme, host and port, without a path, such as 'http://127.0.0.1:8080'")
    return found


def is_dotted_path(value: object) -> bool:
    """Whether a string looks like the path of an object in a module."""
    return isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))


def dotted_path(value: Any) -> Any:
    """The dotted path of an object, the object itself, or None."""
    if value is None or callable(value) or is_dotted_path(value):
        return value
    raise Fault("must be a dotted path, such as 'accounts.permissions.HasAPIKey'")


def tenant(value: Any) -> Any:
    """The id of a tenant, or the dotted path of a function of the user.

    An id such as 'acme.eu' is read as a path: to read a mistyped path as an id would put users into a wrong tenant.
    """
    if callable(value) or (isinstance(value, str) and is_id(value)):
        return value
    raise Fault("must be the id of a tenant, or the dotted path of f(user) -> id")


def user_id(value: Any) -> Any:
    """A format of fields of the user, or the dotted path of a function of the user."""
    wrong = "must be a format of fields of the user, such as 'u_{pk}', or the dotted path of f(user) -> id"
    if callable(value):
        return value
    if not isinstance(value, str):
        raise Fault(wrong)
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError:
        raise Fault(wrong) from None
    fields = [field for _, *field in parts if field[0] is not None]
    if fields:
        if not all(_is_attribute(*field) for field in fields):
            raise Fault(f"{wrong}; a field is the name of one attribute")
        return value
    try:
        return dotted_path(value)
    except Fault:
        raise Fault(wrong) from None


def _is_attribute(name: str | None, spec: str | None, conversion: str | None) -> bool:
    return name is not None and name.isidentifier() and not name.startswith("_") and not spec and not conversion


def scopes(value: Any) -> tuple[str, ...]:
    """Scopes of a key."""
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) and is_scope(one) for one in value):
        raise Fault("must be a list of scopes, such as ['jobs:write']")
    return tuple(dict.fromkeys(value))


def texts(value: Any) -> tuple[str, ...]:
    """Strings that are not empty."""
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) and one for one in value):
        raise Fault("must be a list of strings")
    return tuple(value)


def networks(value: Any) -> tuple[str, ...]:
    """Networks in CIDR notation, at least one, and none so large that it would trust everything."""
    found = texts(value)
    try:
        NetworkPeers(found)
    except ValueError as error:
        raise Fault(f"must be a list of networks, such as ['127.0.0.0/8']: {error}") from None
    return found


def header_prefix(value: Any) -> str:
    """A prefix of header names, as in the proxy."""
    if not isinstance(value, str) or not _HEADER_PREFIX.fullmatch(value):
        raise Fault("must look like 'X-Name-'")
    taken = [name for name in _TAKEN_NAMES if name.startswith(value.lower()) or value.lower().startswith(name)]
    if taken:
        raise Fault(f"would cover {taken[0]}")
    return value


def key_prefix(value: Any) -> str:
    """A prefix of keys, as in the proxy."""
    if not isinstance(value, str) or not _KEY_PREFIX.fullmatch(value):
        raise Fault("must be 1 to 16 of a-z and 0-9, a letter first")
    return value
