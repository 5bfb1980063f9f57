"""What the commands share: `--json`, the exit statuses, durations, and the user that an argument names.

Exit status 0: done, 1: failed in whole or in part, 2: misuse.
"""

from __future__ import annotations

import contextlib
import json
import re
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from keyproxy_client.django.directory.errors import DirectoryError
from keyproxy_client.django.directory.sql_connection import explained
from keyproxy_client.django.users import user_of_id

_DURATION = re.compile(r"([0-9]{1,9})\s*(s|m|h|d|w)")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION_MAX: Final = timedelta(days=36_525)


class Misuse(CommandError):
    """The arguments cannot be used. Exit status 2."""

    def __init__(self, text: str) -> None:
        super().__init__(text, returncode=2)


class ReportingCommand(BaseCommand):
    """A command that prints a result, as text or with `--json` as one JSON object on stdout."""

    requires_system_checks: Sequence[str] = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Add `--json`."""
        parser.add_argument("--json", action="store_true", dest="as_json", help="Print the result as JSON.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Perform the command. Errors of keyproxy, the database and the settings become one line and status 1 or 2."""
        try:
            self.perform(options)
        except DirectoryError as error:
            raise CommandError(str(error), returncode=1) from error
        except DatabaseError as error:
            raise CommandError(f"the database failed: {explained(error)}", returncode=1) from error
        except ImproperlyConfigured as error:
            raise Misuse(str(error)) from error

    def perform(self, options: Mapping[str, Any]) -> None:
        """The command itself."""
        raise NotImplementedError

    def report(self, result: Mapping[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
        """Print the result to stdout."""
        self.stdout.write(json.dumps(result) if as_json else "\n".join(lines))


def duration(value: str) -> timedelta:
    """For argparse: `90d`, `24h`, `30m`, `45s`, `2w`, also of 0."""
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ArgumentTypeError(f"{value!r} is not a duration: use 90d, 24h, 30m, 45s, 2w")
    length = timedelta(**{_UNITS[match[2]]: int(match[1])})
    if length > _DURATION_MAX:
        raise ArgumentTypeError(f"{value!r} is too long: the maximum is 100 years")
    return length


def life(value: str) -> timedelta | None:
    """For argparse: as `duration`, but positive, or `never`."""
    if value == "never":
        return None
    length = duration(value)
    if not length:
        raise ArgumentTypeError("a key must live for longer than 0s: use 90d, or never")
    return length


def find_user(text: str) -> Any:
    """The user whose name, primary key or id in keyproxy this is. Raises CommandError if there is none, or several."""
    manager = get_user_model()._default_manager
    name = get_user_model().USERNAME_FIELD
    found = {user.pk: user for user in manager.filter(**{name: text})[:2]}
    # The primary key may be a number or a UUID, which the text is not.
    with contextlib.suppress(ValueError, TypeError, ValidationError):
        found |= {user.pk: user for user in manager.filter(pk=text)[:1]}
    try:
        by_id = user_of_id(text)
    except ImproperlyConfigured:
        # USER_ID has no inverse; the name and the primary key remain.
        by_id = None
    if by_id is not None:
        found[by_id.pk] = by_id
    if not found:
        raise CommandError(
            f"Django has no user {text!r}: give a {name}, a primary key or an id in keyproxy", returncode=1
        )
    if len(found) > 1:
        keys = ", ".join(str(pk) for pk in found)
        raise Misuse(f"{text!r} names several users, with the primary keys {keys}")
    return next(iter(found.values()))
