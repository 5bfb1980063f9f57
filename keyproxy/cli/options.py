"""Shared by all commands: the configuration, the store, and the options that select them."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import uvloop

from keyproxy.cli.output import Failure
from keyproxy.config import loader
from keyproxy.config.schema import Settings
from keyproxy.platform.sockets import BindError, conflicts
from keyproxy.store.directory.directory import Actor, DirectoryError
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.embedded.embedded_postgres import EmbeddedError
from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.database import StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

OLD_SCHEMA: Final = "the database has no schema, or an old one: run keyproxy migrate with this configuration first"

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


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
        DirectoryError,
        StoreConflict,
        StoreUnavailable,
        EmbeddedError,
        migrations.MigrationError,
        BindError,
    )


def config_option(command: _Decorated) -> _Decorated:
    """Add --config FILE, also read from KEYPROXY_CONFIG."""
    return click.option(
        "--config",
        "config_path",
        envvar="KEYPROXY_CONFIG",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Configuration file (TOML). [defaults only]",
    )(command)


def json_option(command: _Decorated) -> _Decorated:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def admin_options(command: _Decorated) -> _Decorated:
    """Add --admin-url and --admin-token-file."""
    for option in (
        click.option(
            "--admin-token-file",
            "token_path",
            envvar="KEYPROXY_ADMIN_TOKEN_FILE",
            metavar="FILE",
            type=click.Path(dir_okay=False, path_type=Path),
            help="File with the token for --admin-url. [KEYPROXY_ADMIN_TOKEN]",
        ),
        click.option(
            "--admin-url",
            envvar="KEYPROXY_ADMIN_URL",
            metavar="URL",
            callback=_admin_url,
            help="Use a running `keyproxy admin` instead of the database.",
        ),
    ):
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


def actor() -> Actor:
    """The user that runs this command, for the audit log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return Actor(f"cli:{user}", socket.gethostname())


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
