"""keyproxy admin, keyproxy admin token create|list|revoke."""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import click
import uvloop

from keyproxy.auth.api_key import KeyFormat
from keyproxy.cli.options import (
    actor,
    check_addresses,
    check_schema,
    config_option,
    json_option,
    load,
    require_schema,
    store,
)
from keyproxy.cli.output import print_message, print_result, require_stdout, showing_secret
from keyproxy.cli.parameters import duration
from keyproxy.config.loader import ConfigError
from keyproxy.platform import garbage
from keyproxy.store.directory.admin_tokens import AdminTokens
from keyproxy.store.postgres.database import Database

if TYPE_CHECKING:
    from keyproxy.config.schema import Settings

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_PAGE: Final = 500
_COLUMNS: Final = ("id", "name", "state", "hint", "scopes", "tenant", "expires_at", "last_used_at")


@click.group("admin", invoke_without_command=True)
@config_option
@click.pass_context
def admin_group(context: click.Context, config_path: Path | None) -> None:
    """Run the control plane: the admin API.

    Without a command, serves until SIGTERM: access log on stdout, everything else on stderr. SIGHUP reloads routes, keys,
    reminders, the certificate and the token. Create tokens with `keyproxy admin token create`, or put one in the file
    admin.token_file.
    """
    if context.invoked_subcommand is not None:
        context.obj = config_path
        return
    _serve(config_path)


def _serve(config_path: Path | None) -> None:
    # These imports take longer than any other command runs.
    with garbage.importing():
        from keyproxy.admin.app import Admin, RefusedToStart
        from keyproxy.admin.authentication import TokenFileError
        from keyproxy.wire.tls import TlsError

    loaded = load(config_path, is_serving=True)
    settings = loaded.settings
    check_addresses(settings)

    def read_again() -> Settings:
        try:
            return load(config_path, is_serving=True).settings
        except ConfigError as error:
            raise RefusedToStart("; ".join(error.problems)) from error

    async def run(dsn: str) -> None:
        await check_schema(dsn)
        admin = Admin(settings, dsn)
        await admin.run(access_log_fd=sys.stdout.fileno(), started=_started, read_again=read_again)

    with store(loaded) as dsn:
        try:
            uvloop.run(run(dsn))
        except (TokenFileError, TlsError, RefusedToStart) as error:
            raise ConfigError([str(error)]) from error


def _started(address: str) -> None:
    _log.info("admin API on %s", address)


@admin_group.group("token")
def token_group() -> None:
    """Manage admin API tokens. A token is shown once, when it is created."""


@token_group.command("create")
@click.option("--name", default="", help="The token's owner or purpose.")
@click.option(
    "--scope",
    "wanted",
    multiple=True,
    required=True,
    metavar="SCOPE",
    help="A permission, such as keys:write; repeatable. tenant:ID limits it to one tenant.",
)
@click.option(
    "--expires-in",
    default="90d",
    show_default=True,
    callback=duration,
    metavar="TIME",
    help="Lifetime, such as 90d or 24h, or never.",
)
@config_option
@json_option
def token_create(
    name: str, wanted: tuple[str, ...], expires_in: timedelta | str, config_path: Path | None, *, as_json: bool
) -> None:
    """Create a token.

    \b
    keyproxy admin token create --name console --scope admin:write
    keyproxy admin token create --name "acme's staff" --scope keys:read --scope keys:write --scope tenant:acme
    """
    from keyproxy.admin.scopes import InvalidScopes, read

    try:
        granted = read(wanted)
    except InvalidScopes as error:
        raise click.BadParameter(str(error), param_hint="--scope") from error
    life = expires_in if isinstance(expires_in, timedelta) else None
    require_stdout()
    token = _with_tokens(
        config_path,
        lambda tokens: tokens.create(name, granted.scopes, tenant_id=granted.tenant, expires_in=life),
    )
    for warning in token.pop("warnings", ()):
        print_message(f"warning: {warning}")
    lost = f"the secret of token {token['id']} is lost: `keyproxy admin token revoke {token['id']}`"
    with showing_secret(f"{lost}, then create a new token"):
        print_result(token, as_json=as_json, columns=_COLUMNS)
    if not as_json:
        print_message("this is the only time the secret is shown")


@token_group.command("list")
@config_option
@json_option
def token_list(config_path: Path | None, *, as_json: bool) -> None:
    """List tokens. Their secrets are not stored and cannot be shown."""

    async def work(tokens: AdminTokens) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        while rows := await tokens.tokens(str(found[-1]["id"]) if found else "", _PAGE):
            found += rows
        return found

    print_result(_with_tokens(config_path, work), as_json=as_json, columns=_COLUMNS)


@token_group.command("revoke")
@click.argument("token_id", metavar="ID")
@config_option
@json_option
def token_revoke(token_id: str, config_path: Path | None, *, as_json: bool) -> None:
    """Revoke a token permanently. The next request that uses it is refused."""
    print_result(_with_tokens(config_path, lambda tokens: tokens.revoke(token_id)), as_json=as_json, columns=_COLUMNS)


def _with_tokens(config_path: Path | None, work: Callable[[AdminTokens], Awaitable[_T]]) -> _T:
    context = click.get_current_context().find_object(Path)
    loaded = load(config_path or context)
    settings = loaded.settings

    async def worked(dsn: str) -> _T:
        await require_schema(dsn)
        seconds = settings.store.statement_timeout_seconds
        database = Database(dsn, pool_size_max=1, statement_timeout_seconds=seconds)
        await database.open()
        try:
            return await work(AdminTokens(database, KeyFormat(settings.keys.prefix), actor()))
        finally:
            await database.close()

    with store(loaded) as dsn:
        return uvloop.run(worked(dsn))
