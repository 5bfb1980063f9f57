"""Shared by the commands on tenants, users, keys, plans and the audit log: options, the directory, and output."""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import uvloop

from keyproxy.auth.api_key import KeyFormat
from keyproxy.cli.options import (
    actor,
    admin_options,
    admin_token,
    config_option,
    json_option,
    load,
    require_schema,
    store,
)
from keyproxy.cli.output import Failure, print_message, print_result, require_stdout, showing_secret
from keyproxy.config.route_review import scope_warnings
from keyproxy.config.schema import Settings
from keyproxy.platform import clock
from keyproxy.store.directory.directory import Directory, Entity, EntityPage, KeyWish
from keyproxy.store.directory.entities import ACTS_FOR_NONE
from keyproxy.store.directory.interface import AS_CONFIGURED_THERE, DirectoryOperations
from keyproxy.store.postgres.database import Database
from keyproxy.store.usage.usage_service import UsageOperations, UsageService

if TYPE_CHECKING:
    from keyproxy.cli.remote.admin_client import AdminClient

_T = TypeVar("_T")

PAGE: Final = 500
_STATEMENT_SECONDS: Final = 60.0

TENANT_COLUMNS: Final = ("id", "name", "plan", "roles", "disabled_at", "created_at", "users")
USER_COLUMNS: Final = ("id", "tenant", "plan", "roles", "disabled_at", "created_at", "keys")
KEY_COLUMNS: Final = (
    "id",
    "user",
    "tenant",
    "state",
    "hint",
    "name",
    "scopes",
    "roles",
    "acts_for",
    "is_test",
    "expires_at",
    "last_used_at",
)


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a command: its configuration and its output format."""

    config_path: Path | None
    as_json: bool
    admin_url: str | None = None
    admin_token: str = field(default="", repr=False)
    _remote_labels: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def money_unit(self) -> str:
        """The label of money: the configured one, or the one that the admin API returned with the last result."""
        return self.settings().money.unit if self.admin_url is None else self._remote_labels.get("money", "")

    def run_for_secret(self, work: Callable[[DirectoryOperations], Awaitable[_T]]) -> _T:
        """As `run`, for an action that creates a secret: refuse it if stdout is closed."""
        require_stdout()
        return self.run(work)

    def run(self, work: Callable[[DirectoryOperations], Awaitable[_T]]) -> _T:
        """Run an operation in the database or, with --admin-url, through the admin API."""
        url = self.admin_url
        if url is not None:
            # These imports take longer than a command runs.
            from keyproxy.cli.remote.remote_directory import RemoteDirectory

            return self._run_remotely(url, lambda client: work(RemoteDirectory(client)))
        settings = self.settings()
        key_format = KeyFormat(settings.keys.prefix, accepts_foreign=settings.keys.accept_foreign)
        return self.run_in_store(
            lambda database: work(
                Directory(database, key_format, actor(), approvals=settings.approvals, settings=settings)
            )
        )

    def run_to_mint(self, work: Callable[[DirectoryOperations], Awaitable[_T]]) -> _T:
        """As `run_for_secret`, for the minting of agent tokens."""
        if self.admin_url is not None:
            return self.run_for_secret(work)
        require_stdout()
        # The libraries for signatures take longer to load than a command runs.
        from keyproxy.store.directory.agents.operator_mint import minting

        settings = self.settings()
        key_format = KeyFormat(settings.keys.prefix, accepts_foreign=settings.keys.accept_foreign)

        async def minted(database: Database) -> _T:
            async with minting(database, settings.access, clock.now) as mint:
                return await work(Directory(database, key_format, actor(), mint=mint))

        return self.run_in_store(minted)

    def run_with_secrets(self, work: Callable[[DirectoryOperations], Awaitable[_T]]) -> _T:
        """As `run`, for operations that seal the secrets of providers."""
        if self.admin_url is not None:
            return self.run(work)
        # The libraries for ciphers take longer to load than a command runs.
        from keyproxy.process.providers.operator_secrets import OperatorSecrets

        settings = self.settings()
        key_format = KeyFormat(settings.keys.prefix, accepts_foreign=settings.keys.accept_foreign)
        secrets = OperatorSecrets(settings)
        return self.run_in_store(lambda database: work(Directory(database, key_format, actor(), secrets=secrets)))

    def run_usage(self, work: Callable[[UsageOperations], Awaitable[_T]]) -> _T:
        """As `run`, for queries of usage and limits."""
        url = self.admin_url
        if url is not None:
            from keyproxy.cli.remote.remote_usage import RemoteUsage

            return self._run_remotely(url, lambda client: work(RemoteUsage(client)))
        settings = self.settings()
        return self.run_in_store(lambda database: work(UsageService(database, settings, clock.now)))

    def _run_remotely(self, url: str, work: Callable[[AdminClient], Awaitable[_T]]) -> _T:
        from keyproxy.cli.remote.admin_client import AdminClient

        async def run() -> _T:
            async with AdminClient(url, self.admin_token) as client:
                result = await work(client)
            for warning in client.warnings:
                print_message(f"warning: {warning}")
            self._remote_labels["money"] = client.money_unit
            return result

        return uvloop.run(run())

    def run_in_store(self, work: Callable[[Database], Awaitable[_T]]) -> _T:
        """Run an operation in the configured store itself."""
        loaded = load(self.config_path)

        async def worked(dsn: str) -> _T:
            await require_schema(dsn)
            seconds = max(_STATEMENT_SECONDS, loaded.settings.store.statement_timeout_seconds)
            database = Database(dsn, pool_size_max=1, statement_timeout_seconds=seconds)
            await database.open()
            try:
                return await work(database)
            finally:
                await database.close()

        with store(loaded) as dsn:
            return uvloop.run(worked(dsn))

    def settings(self) -> Settings:
        """The configuration. Raises ConfigError."""
        return load(self.config_path).settings

    def wish(
        self,
        name: str,
        scopes: Sequence[str],
        expires_in: timedelta | str | None,
        *,
        is_test: bool = False,
        plan: str | None = None,
        roles: Sequence[str] = (),
        acts_for: str = ACTS_FOR_NONE,
    ) -> KeyWish:
        """The properties of a new key. `expires_in` None: the configured lifetime; `never`: no expiry."""
        if scopes or not roles:
            self.warn_of_scopes(scopes)
        return KeyWish(name, scopes, is_test, self.life(expires_in), plan, roles, acts_for)

    def life(self, expires_in: timedelta | str | None) -> timedelta | None:
        """The key's lifetime; None: no expiry."""
        if isinstance(expires_in, timedelta):
            return expires_in
        if expires_in is None and self.admin_url is not None:
            return AS_CONFIGURED_THERE
        days = self.settings().keys.age_days_max
        return timedelta(days=days) if expires_in is None and days else None

    def warn_of_scopes(self, *keys: Sequence[str], holder: str = "key") -> None:
        """Warn of a scope that no route requires, and of a key that every route refuses. `keys`: the scopes of each.

        `holder`: what has the scopes.
        """
        if self.admin_url is not None:
            return  # the routes are those of the admin process, which returns its own warnings
        settings = self.settings()
        warnings = (
            one for scopes in dict.fromkeys(map(tuple, keys)) for one in scope_warnings(settings, scopes, holder)
        )
        for warning in dict.fromkeys(warnings):
            print_message(f"warning: {warning}")

    def print_warnings(self, result: dict[str, Any]) -> None:
        """Print and remove the `warnings` of a result. The admin API has returned them apart from it."""
        for warning in result.pop("warnings", ()):
            print_message(f"warning: {warning}")

    def print_result(
        self,
        result: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        columns: Sequence[str],
        *,
        units: Mapping[str, str] | None = None,
    ) -> None:
        """Print a result: JSON for programs, a table or a list of fields for people. `units`: of columns."""
        print_result(result, as_json=self.as_json, columns=columns, units=units)

    def print_secret(self, key: Mapping[str, Any], then: str) -> None:
        """Print a new key. `then`: the step after revoking it if its secret could not be printed."""
        lost = f"the secret of key {key['id']} is lost: `keyproxy key revoke {key['id']}`, then {then}"
        with showing_secret(lost):
            self.print_result(key, KEY_COLUMNS)
        if not self.as_json:
            print_message("this is the only time the secret is shown")


def takes_call(command: Callable[..., Any]) -> Callable[..., Any]:
    """--config, --json, --admin-url and --admin-token-file. The command's first parameter is the Call."""

    @functools.wraps(command)
    def called(
        *arguments: Any,
        config_path: Path | None,
        as_json: bool,
        admin_url: str | None,
        token_path: Path | None,
        **options: Any,
    ) -> Any:
        token = "" if admin_url is None else admin_token(token_path)
        return command(Call(config_path, as_json, admin_url, token), *arguments, **options)

    return config_option(json_option(admin_options(called)))


def yes_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --yes, which destructive commands require without a terminal."""
    return click.option("--yes", is_flag=True, help="Skip the confirmation. Required if stdin is not a terminal.")(
        command
    )


def confirm(question: str, *, yes: bool) -> None:
    """Ask for confirmation. Raises Failure if stdin is not a terminal and --yes is missing."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Failure("this cannot be undone, and stdin is not a terminal: pass --yes")
    click.confirm(question, abort=True, err=True)


async def all_pages(page: Callable[[str], Awaitable[list[Entity]]]) -> list[Entity]:
    """Return all pages of a list."""
    found: list[Entity] = []
    while rows := await page(found[-1]["id"] if found else ""):
        found += rows
    return found


async def every_page(page: Callable[[str | None, int], Awaitable[EntityPage]]) -> list[Entity]:
    """Return all pages of a list with cursors."""
    found: list[Entity] = []
    cursor: str | None = None
    while True:
        items, cursor = await page(cursor, PAGE)
        found += items
        if cursor is None:
            return found


def chosen_plan(plan: str | None, named: str | None, *, none: bool) -> str | None:
    """The plan from PLAN, --plan PLAN or --none; exactly one is required. None: no plan."""
    if (plan is not None) + (named is not None) + none != 1:
        raise click.UsageError("pass one plan, or --none")
    return plan or named


def plan_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """PLAN, --plan PLAN and --none."""
    command = click.option("--none", "none", is_flag=True, help="Remove the plan.")(command)
    command = click.option("--plan", "named", metavar="PLAN", help="Same as the argument PLAN.")(command)
    return click.argument("plan", metavar="[PLAN]", required=False)(command)
