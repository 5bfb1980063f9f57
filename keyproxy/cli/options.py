"""Shared by all commands: the configuration, the store, and the output of results and failures."""

from __future__ import annotations

import contextlib
import errno
import getpass
import logging
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import orjson
import uvloop

from keyproxy.cli import table
from keyproxy.config import loader
from keyproxy.config.schema import Settings
from keyproxy.config.value_checks import is_scope
from keyproxy.platform import standard_streams
from keyproxy.platform.sockets import BindError, conflicts
from keyproxy.store.directory.directory import Actor, DirectoryError
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.embedded.embedded_postgres import EmbeddedError
from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.database import StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

FAILED: Final = 1
MISUSED: Final = 2

OLD_SCHEMA: Final = "the database has no schema, or an old one: run keyproxy migrate with this configuration first"

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_DURATION = re.compile(r"([0-9]+)\s*(s|m|h|d|w)")
_DURATION_DIGITS_MAX: Final = 12
_DURATION_MAX: Final = timedelta(days=36_525)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


#: Errors of a stream that cannot be written: a full disk or quota, a file at its size limit, a broken device.
UNWRITABLE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EPIPE})


class Failure(Exception):
    """A failed command. The text is one line for the operator."""


class NoDatabase(Failure):
    """No database is configured, and the embedded one does not exist."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"there is no embedded database in {directory}: pass --config FILE (or set KEYPROXY_CONFIG) to use another"
            " database, or run `keyproxy migrate` to create this one"
        )


def refusals() -> tuple[type[Exception], ...]:
    """Exceptions that end a command with one line on stderr and status 1."""
    return (
        DirectoryError, StoreConflict, StoreUnavailable, EmbeddedError, migrations.MigrationError, BindError,
    )  # fmt: skip


def config_option(command: _Decorated) -> _Decorated:
    """--config FILE."""
    return click.option(
        "--config", "config_path", envvar="KEYPROXY_CONFIG", metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path), help="Configuration file (TOML). [defaults only]",
    )(command)  # fmt: skip


def json_option(command: _Decorated) -> _Decorated:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def admin_options(command: _Decorated) -> _Decorated:
    """--admin-url and --admin-token-file."""
    for option in (
        click.option("--admin-token-file", "token_path", envvar="KEYPROXY_ADMIN_TOKEN_FILE", metavar="FILE",
                     type=click.Path(dir_okay=False, path_type=Path),
                     help="File with the token for --admin-url. [KEYPROXY_ADMIN_TOKEN]"),
        click.option("--admin-url", envvar="KEYPROXY_ADMIN_URL", metavar="URL", callback=_admin_url,
                     help="Use a running `keyproxy admin` instead of the database."),
    ):  # fmt: skip
        command = option(command)
    return command


def admin_token(path: Path | None) -> str:
    """The token for --admin-url. Raises UsageError."""
    try:
        token = os.environ.get("KEYPROXY_ADMIN_TOKEN", "") if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"cannot read --admin-token-file: {error}") from error
    token = token.strip()
    if not re.fullmatch(r"[!-~]{1,512}", token):
        raise click.UsageError("--admin-url requires a token: set KEYPROXY_ADMIN_TOKEN, or pass --admin-token-file")
    return token


def _admin_url(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"https?://[!-~]+|unix:/[!-~]+", value):
        raise click.BadParameter(f"{value!r} is not a valid URL: use http://host:port, https://host:port or unix:/path")
    return value


def load(path: Path | None, *, is_serving: bool = False, read: str | None = None) -> loader.Config:
    """Load the configuration and set up logging. Short commands print their failure once and do not log."""
    loaded = loader.load(path, os.environ, read=read)
    level = loaded.settings.log.level
    _set_up_logging(level if is_serving or level == "debug" else "error")
    return loaded


def check_addresses(settings: Settings) -> None:
    """Raises ConfigError if listeners overlap, or an upstream is one of them. Resolves names."""
    if wrong := conflicts(settings):
        raise loader.ConfigError(wrong)


@contextlib.contextmanager
def store(
    loaded: loader.Config, *, creates: bool = False, migrates: bool = False, is_quiet: bool = False
) -> Iterator[str]:
    """The DSN of the store while the context lasts. An embedded server is started or attached to, and watched.

    `creates`: an embedded database that does not exist is created. Otherwise NoDatabase is raised: a lookup
    in a new, empty database would find nothing and look like a valid result. `migrates`: migrate the embedded database.
    `is_quiet`: print no note if the embedded database is used because none is configured.
    """
    if loaded.settings.store.dsn != "embedded":
        yield loaded.settings.store.dsn
        return
    directory = embedded_directory(loaded.settings)
    is_default = loaded.origins["store.dsn"].source == "default"
    if not creates and not embedded_postgres.exists(directory):
        raise NoDatabase(directory)
    if is_default and not is_quiet:
        click.echo(f"keyproxy: store.dsn is not set: using the embedded database in {directory}", err=True)
    server = embedded_postgres.start(directory)
    try:
        if migrates:
            uvloop.run(migrations.migrate(server.dsn()))
        with server.watched():
            yield server.dsn()
    finally:
        server.stop()


def embedded_directory(settings: Settings) -> Path:
    """Where the embedded server keeps its data."""
    chosen = settings.store.embedded_dir
    return Path(chosen) if chosen else embedded_postgres.default_directory(os.environ)


async def require_schema(dsn: str) -> None:
    """Raise Failure for a command if the schema is missing or older than this program."""
    try:
        state = await migrations.state(dsn)
    except migrations.MigrationError:
        return  # newer than this program, or not readable by this role: the command may still work
    if state.pending:
        raise Failure(OLD_SCHEMA)


async def check_schema(dsn: str) -> None:
    """Raise Failure for a schema that is too old, which the operator must fix. An unavailable database only logs a
    warning, because it comes back without a restart."""
    try:
        state = await migrations.state(dsn)
    except StoreUnavailable as error:
        _log.warning("%s: starting anyway; requests are refused until the database responds", error)
        return
    except migrations.MigrationError as error:
        _log.warning("%s", error)
        return
    if state.pending:
        raise Failure(OLD_SCHEMA)


def say(text: str) -> None:
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


def actor() -> Actor:
    """The user that runs this command, for the audit log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return Actor(f"cli:{user}", socket.gethostname())


def tell(result: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, as_json: bool, columns: Sequence[str]) -> None:
    """Print a result: JSON, a table of rows, or the fields of one object below each other."""
    if as_json:
        click.echo(orjson.dumps(result).decode("utf-8"))
    elif isinstance(result, Mapping):
        shown = {name: value for name, value in result.items() if not isinstance(value, Mapping)}
        width = max(map(len, shown), default=0)
        for name, value in shown.items():
            click.echo(f"{name:<{width}}  {_cell(value)}")
    else:
        terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for line in table.lines([[_cell(row.get(name)) for name in columns] for row in result], columns, terminal):
            click.echo(line)


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


def _cell(value: object) -> str:
    if value is None or value == "":
        return table.NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return _visible(" ".join(map(str, value))) or table.NOTHING
    return _visible(str(value))


def _visible(text: str) -> str:
    """Text from any SQL client, without line breaks and escape sequences that a terminal would interpret."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", None)
        text = super().format(record)
        return text if request_id is None else f"{text} request_id={request_id}"


def _set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # At its usual level asyncio logs tasks and handles, and their repr may contain a request's bytes.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL if level != "debug" else logging.WARNING)
