"""The exceptions that end a command, and its exit status. Imported when a command fails."""

from __future__ import annotations

import sys
from typing import Final

import click

from keyproxy.auth.api_key import masked
from keyproxy.cli.options import refusals
from keyproxy.cli.output import UNWRITABLE, AdminApiUnavailable, Failure, print_message
from keyproxy.config.loader import ConfigError
from keyproxy.platform import standard_streams
from keyproxy.store.postgres.database import StoreUnavailable

_FAILED: Final = 1
_MISUSED: Final = 2


def status_of(error: BaseException) -> int | None:
    """Print the error for the operator. Returns the exit status; None, and prints nothing, if it is a defect."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        # The message is the help itself; as a usage error it would appear inside another usage line.
        click.echo(error.format_message(), err=True)
        return _MISUSED
    if isinstance(error, click.UsageError):
        click.UsageError(masked(error.format_message()), error.ctx).show()
        return _MISUSED
    if isinstance(error, ConfigError):
        for line in error.problems:
            _print_problem(line)
        return _MISUSED
    if isinstance(error, BrokenPipeError):
        # The reader of the output has closed the pipe.
        standard_streams.abandon(sys.stdout.fileno())
        return _FAILED
    problem = _file_problem(error) if isinstance(error, OSError) else _problem(error)
    if problem is None:
        return None
    _print_problem(problem)
    return _FAILED


def _problem(error: BaseException) -> str | None:
    """One line; None for a defect."""
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Failure | AdminApiUnavailable):
        return str(error)
    if isinstance(error, StoreUnavailable):
        return f"the database is unavailable: {' '.join(str(error).split())}"
    return " ".join(str(error).split()) if isinstance(error, refusals()) else None


def _file_problem(error: OSError) -> str | None:
    if error.filename is None and error.errno not in UNWRITABLE:
        return None
    if error.filename is None:
        standard_streams.abandon(sys.stdout.fileno())
    return f"{error.filename or 'the output'} cannot be used: {error.strerror}"


def _print_problem(text: str) -> None:
    # An argument may be a key where an id belongs, and other people can read terminals and job logs.
    print_message(masked(text))
