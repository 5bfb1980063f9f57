"""The output of commands: results on stdout, messages and progress on stderr."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import click
import orjson

from keyproxy.cli import table
from keyproxy.platform import standard_streams
from keyproxy.store.postgres.database import StoreUnavailable

#: Errors of a stream that cannot be written: a full disk or quota, a file at its size limit, a broken device.
UNWRITABLE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EPIPE})


class Failure(Exception):
    """A failed command. The text is one line for the operator."""


class AdminApiUnavailable(StoreUnavailable):
    """The admin API, or the database behind it, is unavailable. The text is one line for the operator."""


def print_message(text: str) -> None:
    """Print a message on stderr."""
    try:
        click.echo(f"keyproxy: {text}", err=True)
    except OSError:
        # The message has no other destination, and the command itself has not failed.
        standard_streams.abandon(sys.stderr.fileno())


def require_stdout() -> None:
    """Call before creating a secret. Raises Failure if stdout is closed."""
    if standard_streams.is_stdout_missing():
        raise Failure("stdout is closed, so the secret cannot be shown: nothing was changed")


@contextlib.contextmanager
def showing_secret(if_lost: str) -> Iterator[None]:
    """Wrap the printing of a secret. Raises Failure if that fails; `if_lost` names the secret and the remedy."""
    try:
        yield
    except OSError as error:
        standard_streams.abandon(sys.stdout.fileno())
        raise Failure(f"stdout cannot be written ({error.strerror}): {if_lost}") from error


def print_result(
    result: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    as_json: bool,
    columns: Sequence[str],
    units: Mapping[str, str] | None = None,
) -> None:
    """Print a result: JSON, a table of rows, or the fields of one object below each other.

    `units`: of columns of the table.
    """
    if as_json:
        click.echo(orjson.dumps(result).decode("utf-8"))
    elif isinstance(result, Mapping):
        shown = {name: value for name, value in result.items() if not isinstance(value, Mapping)}
        width = max(map(len, shown), default=0)
        for name, value in shown.items():
            click.echo(f"{name:<{width}}  {_cell(value)}")
    else:
        terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        cells = [[_cell(row.get(name)) for name in columns] for row in result]
        for line in table.lines(cells, columns, terminal, units):
            click.echo(line)


def print_document(value: object) -> None:
    """Print a JSON value for people, indented."""
    for line in json.dumps(value, ensure_ascii=False, indent=2).split("\n"):
        click.echo(_visible(line))


class Progress:
    """Progress of a long operation, on one line of stderr that is overwritten. Silent if stderr is not a terminal."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what = what
        self._total = f" of {total}" if total is not None else ""
        self._is_shown = sys.stderr.isatty()

    def at(self, count: int) -> None:
        """Report progress."""
        if self._is_shown:
            click.echo(f"\r{count}{self._total} {self._what}", err=True, nl=False)

    def end(self) -> None:
        """End the line: the operation is done or interrupted."""
        if self._is_shown:
            click.echo(err=True)


def _cell(value: object) -> str:
    if value is None or value == "":
        return table.NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        # Not as if it were absent: a ceiling without roles allows nothing, and no ceiling allows everything.
        return _visible(" ".join(map(str, value))) or table.EMPTY
    return _visible(str(value))


def _visible(text: str) -> str:
    """Text from any SQL client, without line breaks and escape sequences that a terminal would interpret."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
