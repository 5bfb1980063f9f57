"""Click callbacks that parse the values of options: durations, times, scopes, roles."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

import click

from keyproxy.auth.names import is_role, is_scope

_DURATION = re.compile(r"([0-9]+)\s*(s|m|h|d|w)")
_DURATION_DIGITS_MAX: Final = 12
_DURATION_MAX: Final = timedelta(days=36_525)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def duration(_context: click.Context, _parameter: click.Parameter, value: str | None) -> timedelta | str | None:
    """A click callback: `90d`, `24h`, `30m`, `45s`, `2w` as a timedelta; `never` unchanged."""
    return value if value is None or value == "never" else _timedelta(value, "or never", least=1)


def span(_context: click.Context, _parameter: click.Parameter, value: str | None) -> timedelta | None:
    """A click callback: `90d`, `24h`, `30m`, `45s`, `2w` as a timedelta."""
    return None if value is None else _timedelta(value, "for example", least=1)


def grace(_context: click.Context, _parameter: click.Parameter, value: str) -> timedelta:
    """A click callback: as `span`, but accepts `0s`."""
    return _timedelta(value, "or 0s", least=0)


def instant(_context: click.Context, _parameter: click.Parameter, value: str | None) -> datetime | None:
    """A click callback: an ISO 8601 date or time, UTC by default, or a duration before now."""
    if value is None:
        return None
    if _DURATION.fullmatch(value):
        return datetime.now(UTC) - _timedelta(value, "", least=0)
    try:
        when = datetime.fromisoformat(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a time: use 2026-01-31, 2026-01-31T12:00Z or 7d") from error
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


def _timedelta(value: str, more: str, *, least: int) -> timedelta:
    match = _DURATION.fullmatch(value)
    digits = "" if match is None else match[1].lstrip("0") or "0"
    if match is None or (len(digits) == 1 and int(digits) < least):
        raise click.BadParameter(f"{value!r} is not a duration: use 90d, 24h, 30m, 45s, 2w {more}")
    try:
        # Check the length before parsing: int() refuses thousands of digits.
        long = timedelta(**{_UNITS[match[2]]: int(digits[:_DURATION_DIGITS_MAX])})
        is_too_long = len(digits) > _DURATION_DIGITS_MAX or long > _DURATION_MAX
    except OverflowError:
        is_too_long = True
    if is_too_long:
        raise click.BadParameter(f"{value[:30]!r} is too long: the maximum is 100 years")
    return long


def scopes(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """A click callback: validated scopes without duplicates."""
    for value in values:
        if not is_scope(value):
            raise click.BadParameter(f"{value!r} is not a scope: use a word such as jobs:write, without wildcards")
    return tuple(dict.fromkeys(values))


def role(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """A click callback: a validated name of a role or of a kind of owned ids."""
    if value is not None and not is_role(value):
        raise click.BadParameter(f"{value!r} is not valid: use lower-case letters, digits, _ and -, such as reader")
    return value


def roles(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """A click callback: validated names of roles without duplicates."""
    for value in values:
        role(_context, _parameter, value)
    return tuple(dict.fromkeys(values))
