"""Checks of configuration values: each returns the fault of a value as a predicate, such as "must be true", or None."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from keyproxy.auth.names import is_scope
from keyproxy.config import addresses, dsn
from keyproxy.http import webhook_signature
from keyproxy.http.forwarding import TrustRule
from keyproxy.http.path_patterns import InvalidPatternError, parse_pattern

#: Returns the fault of a value, or None.
Check = Callable[[Any], str | None]


def within(low: float, high: float = 1e12) -> Check:
    """The check for a number between these bounds, both included."""

    def wrong(value: Any) -> str | None:
        if low <= value <= high:
            return None
        if high < 1e12:
            return f"must be at least {low:g} and at most {high:g}"
        return f"must be at least {low:g}" if value < low else f"is too large: at most {high:.0f}"

    return wrong


def one_of(*choices: object) -> Check:
    """The check for one of these values."""
    return lambda value: None if value in choices else "must be " + " or ".join(repr(one) for one in choices)


def optional_upstream_url(value: str) -> str | None:
    """The URL of an upstream, or nothing."""
    return None if value == "" else addresses.upstream_problem(value)


def store_dsn(value: str) -> str | None:
    """`embedded`, or the URL of a PostgreSQL database."""
    if value == "embedded":
        return None
    if not value.startswith(("postgresql://", "postgres://")):
        return "must be 'embedded' or 'postgresql://…'"
    try:
        dsn.parse(value)
    except dsn.InvalidDsnError as error:
        return str(error)
    return None


#: Header names with another meaning to this proxy, which the prefix must not cover.
_TAKEN_NAMES: Final = ("x-forwarded-", "x-api-key", "x-request-id", "x-real-ip")


def header_prefix(value: str) -> str | None:
    """A prefix of header names that covers none with another meaning."""
    if not re.fullmatch(r"X-[A-Za-z0-9-]{1,40}-", value):
        return "must look like 'X-Name-'"
    taken = [name for name in _TAKEN_NAMES if name.startswith(value.lower()) or value.lower().startswith(name)]
    return f"would cover {taken[0]}" if taken else None


def key_prefix(value: str) -> str | None:
    """A prefix of keys."""
    return None if re.fullmatch(r"[a-z][a-z0-9]{0,15}", value) else "must be 1 to 16 of a-z and 0-9"


#: The options allowed in the query of a Redis URL.
_REDIS_OPTIONS: Final = frozenset(
    {"db", "username", "password", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
)


def ledger_backend(value: str) -> str | None:
    """`postgres`, or the URL of a Redis server."""
    if value == "postgres":
        return None
    wanted = "must be 'postgres', 'redis://host[:port][/db]', 'rediss://…' or 'unix:///path[?db=N]'"
    try:
        parts = urlsplit(value)
        has_address = parts.path.startswith("/") if parts.scheme == "unix" else bool(parts.hostname and parts.port != 0)
    except ValueError:
        return wanted
    if parts.scheme not in ("redis", "rediss", "unix") or not has_address or parts.fragment:
        return wanted
    if parts.scheme != "unix" and not re.fullmatch(r"/?[0-9]*", parts.path):
        return "must have a database number after the host, or nothing"
    unknown = {name.partition("=")[0] for name in parts.query.split("&")} - _REDIS_OPTIONS - {""}
    return f"has unknown options; known options: {', '.join(sorted(_REDIS_OPTIONS))}" if unknown else None


def webhook_url(value: str) -> str | None:
    """The URL of a webhook, or nothing."""
    return None if value == "" else webhook_signature.url_problem(value)


def webhook_secret(value: str) -> str | None:
    """A secret of a webhook, or nothing."""
    try:
        webhook_signature.key_of(value) if value else None
    except webhook_signature.InvalidSecretError as error:
        return str(error)
    return None


def days_before(value: list[int]) -> str | None:
    """Numbers of days before an expiry."""
    if not 1 <= len(value) <= 10 or len(set(value)) < len(value) or not all(1 <= days <= 365 for days in value):
        return "must be 1 to 10 different numbers of days, each from 1 to 365"
    return None


def percentages(value: list[int]) -> str | None:
    """Percentages of a limit at which an alert is sent, or none."""
    if len(value) > 5 or len(set(value)) < len(value) or not all(1 <= one <= 100 for one in value):
        return "must be at most 5 different percentages, each from 1 to 100"
    return None


#: The access log with every request, which `true` means too, and the one without successes.
ALL: Final = "all"
REFUSALS: Final = "refusals"


def access_log(value: bool | str | float) -> str | None:
    """Which requests the access log has."""
    if isinstance(value, bool) or value in (ALL, REFUSALS) or (isinstance(value, float) and 0.0 < value <= 1.0):
        return None
    return f"must be true, {ALL!r}, false, {REFUSALS!r}, or the fraction of successes to log, above 0 and at most 1"


def trusted_networks(value: list[str]) -> str | None:
    """Addresses and networks of trusted proxies."""
    try:
        TrustRule(value)
    except ValueError as error:
        return str(error)
    return None


def route_match(value: str) -> str | None:
    """The pattern of a route."""
    try:
        parse_pattern(value)
    except InvalidPatternError as error:
        return str(error)
    return None


def route_scopes(value: list[str]) -> str | None:
    """The scopes that a route requires."""
    bad = [scope for scope in value if not is_scope(scope)]
    return f"{bad[0]!r} is not a valid scope" if bad else None


#: An identity with more effective scopes has none.
_OFFERED_SCOPES_MAX: Final = 128


def offered_scopes(value: list[str]) -> str | None:
    """The scopes that the authorization server offers."""
    if len(value) > _OFFERED_SCOPES_MAX:
        return f"must have at most {_OFFERED_SCOPES_MAX} scopes, not {len(value)}"
    return route_scopes(value)


_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def tool_name(value: str) -> str | None:
    """The name of a tool or provider."""
    return None if _TOOL_NAME.fullmatch(value) else "must have 1 to 128 letters, digits, '_', '.' and '-'"


def optional_tool_name(value: str) -> str | None:
    """The name of a tool, or nothing."""
    return tool_name(value) if value else None
