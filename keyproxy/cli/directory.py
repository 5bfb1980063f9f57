"""keyproxy tenant|user|key."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import uvloop

from keyproxy.cli.setting import (
    actor,
    config_option,
    duration,
    json_option,
    load,
    scopes,
    store,
    tell,
)
from keyproxy.keyformat import KeyFormat
from keyproxy.settings import Settings
from keyproxy.store.database import Database
from keyproxy.store.directory import Directory, Entity, KeyFilter, KeyWish

_T = TypeVar("_T")
_PAGE: Final = 500

_TENANT_COLUMNS: Final = ("id", "name", "disabled_at", "created_at")
_USER_COLUMNS: Final = ("id", "tenant", "disabled_at", "created_at")
_KEY_COLUMNS: Final = ("id", "user", "tenant", "hint", "name", "scopes", "is_test", "expires_at", "revoked_at")


def _run(config_path: Path | None, work: Callable[[Directory, Settings], Awaitable[_T]]) -> _T:
    """Do something with the directory of the configured store."""
    settings = load(config_path).settings

    async def worked(dsn: str) -> _T:
        database = Database(
            dsn, pool_size_max=1, statement_timeout_seconds=max(30.0, settings.store.statement_timeout_seconds)
        )
        await database.open()
        try:
            return await work(Directory(database, KeyFormat(settings.keys.prefix), actor()), settings)
        finally:
            await database.close()

    with store(settings) as dsn:
        return uvloop.run(worked(dsn))


async def _all_pages(page: Callable[[str], Awaitable[list[Entity]]]) -> list[Entity]:
    found: list[Entity] = []
    while rows := await page(found[-1]["id"] if found else ""):
        found += rows
    return found


def _confirm(question: str, *, yes: bool) -> None:
    """Ask a person; a program has decided already."""
    if not yes and sys.stdin.isatty():
        click.confirm(question, abort=True, err=True)


def _tell_secret(key: dict[str, Any], *, as_json: bool) -> None:
    tell(key, as_json=as_json, columns=_KEY_COLUMNS)
    if not as_json:
        click.echo("This is the only time the secret is shown.", err=True)


_yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


@click.group("tenant")
def tenant_group() -> None:
    """Tenants: the customer organisations."""


@tenant_group.command("create")
@click.argument("tenant_id", metavar="ID")
@click.option("--name", default="", help="A name for people.")
@config_option
@json_option
def tenant_create(tenant_id: str, name: str, config_path: Path | None, *, as_json: bool) -> None:
    """Create a tenant. One that is there already is left as it is.

    \b
    keyproxy tenant create acme --name "Acme Ltd"
    """
    tenant = _run(config_path, lambda directory, _: directory.create_tenant(tenant_id, name))
    tell(tenant, as_json=as_json, columns=_TENANT_COLUMNS)


@tenant_group.command("list")
@config_option
@json_option
def tenant_list(config_path: Path | None, *, as_json: bool) -> None:
    """List all tenants."""
    rows = _run(config_path, lambda directory, _: _all_pages(lambda after: directory.tenants(after, _PAGE)))
    tell(rows, as_json=as_json, columns=_TENANT_COLUMNS)


@tenant_group.command("show")
@click.argument("tenant_id", metavar="ID")
@config_option
@json_option
def tenant_show(tenant_id: str, config_path: Path | None, *, as_json: bool) -> None:
    """Show one tenant."""
    tell(_run(config_path, lambda directory, _: directory.tenant(tenant_id)), as_json=as_json, columns=_TENANT_COLUMNS)


@tenant_group.command("delete")
@click.argument("tenant_id", metavar="ID")
@_yes_option
@config_option
@json_option
def tenant_delete(tenant_id: str, config_path: Path | None, *, yes: bool, as_json: bool) -> None:
    """Delete a tenant with all its users and keys."""
    _confirm(f"Delete tenant {tenant_id} with all its users and keys?", yes=yes)
    done = _run(config_path, lambda directory, _: directory.delete_tenant(tenant_id))
    tell(done, as_json=as_json, columns=_TENANT_COLUMNS)


@click.group("user")
def user_group() -> None:
    """Users: the accounts on whose behalf work is done."""


@user_group.command("create")
@click.argument("user_id", metavar="ID")
@click.option("--tenant", "tenant_id", required=True, metavar="TENANT", help="The tenant it belongs to.")
@click.option("--no-key", is_flag=True, help="Issue no first key.")
@click.option("--scope", "wanted", multiple=True, callback=scopes, metavar="SCOPE", help="A scope of the first key.")
@config_option
@json_option
def user_create(
    user_id: str, tenant_id: str, wanted: tuple[str, ...], config_path: Path | None, *, no_key: bool, as_json: bool
) -> None:
    """Create a user and issue its first live key. One that is there already is left as it is and gets no key.

    \b
    keyproxy user create u_42 --tenant acme --scope jobs:write
    """

    async def work(directory: Directory, settings: Settings) -> Entity:
        wish = None if no_key else KeyWish(scopes=wanted, expires_in=_default_life(settings))
        return await directory.create_user(user_id, tenant_id, wish)

    user = _run(config_path, work)
    tell(user, as_json=as_json, columns=_USER_COLUMNS)
    if not as_json and user["key"] is not None:
        click.echo()
        _tell_secret(user["key"], as_json=False)


@user_group.command("list")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only this tenant's.")
@config_option
@json_option
def user_list(tenant_id: str | None, config_path: Path | None, *, as_json: bool) -> None:
    """List users."""
    rows = _run(config_path, lambda directory, _: _all_pages(lambda after: directory.users(after, _PAGE, tenant_id)))
    tell(rows, as_json=as_json, columns=_USER_COLUMNS)


@user_group.command("show")
@click.argument("user_id", metavar="ID")
@config_option
@json_option
def user_show(user_id: str, config_path: Path | None, *, as_json: bool) -> None:
    """Show one user."""
    tell(_run(config_path, lambda directory, _: directory.user(user_id)), as_json=as_json, columns=_USER_COLUMNS)


@user_group.command("delete")
@click.argument("user_id", metavar="ID")
@_yes_option
@config_option
@json_option
def user_delete(user_id: str, config_path: Path | None, *, yes: bool, as_json: bool) -> None:
    """Delete a user with all its keys."""
    _confirm(f"Delete user {user_id} with all its keys?", yes=yes)
    done = _run(config_path, lambda directory, _: directory.delete_user(user_id))
    tell(done, as_json=as_json, columns=_USER_COLUMNS)


@click.group("key")
def key_group() -> None:
    """Keys: the secrets that workers present. A secret is shown once, when it is made."""


@key_group.command("issue")
@click.option("--user", "user_id", required=True, metavar="USER", help="The user it belongs to.")
@click.option("--test", "is_test", is_flag=True, help="A test key: its traffic is told apart everywhere.")
@click.option("--scope", "wanted", multiple=True, callback=scopes, metavar="SCOPE", help="What it may do; repeatable.")
@click.option("--name", default="", help="A name for people.")
@click.option("--expires-in", callback=duration, metavar="TIME", help="Such as 90d or 24h; never. [keys.age_days_max]")
@config_option
@json_option
def key_issue(
    user_id: str, wanted: tuple[str, ...], name: str, expires_in: timedelta | str | None, config_path: Path | None,
    *, is_test: bool, as_json: bool,
) -> None:  # fmt: skip
    """Issue a key.

    \b
    keyproxy key issue --user u_42 --scope jobs:write --name nightly
    keyproxy key issue --user u_42 --test --expires-in 7d
    """

    async def work(directory: Directory, settings: Settings) -> Entity:
        life = expires_in if isinstance(expires_in, timedelta) else None
        wish = KeyWish(name, wanted, is_test, _default_life(settings) if expires_in is None else life)
        return await directory.issue_key(user_id, wish)

    _tell_secret(_run(config_path, work), as_json=as_json)


@key_group.command("list")
@click.option("--user", "user_id", metavar="USER", help="Only this user's.")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only this tenant's.")
@config_option
@json_option
def key_list(user_id: str | None, tenant_id: str | None, config_path: Path | None, *, as_json: bool) -> None:
    """List keys, without their secrets, which nobody has."""
    rows = _run(
        config_path,
        lambda directory, _: _all_pages(
            lambda after: directory.keys(after, _PAGE, KeyFilter(user=user_id, tenant=tenant_id))
        ),
    )
    tell(rows, as_json=as_json, columns=_KEY_COLUMNS)


@key_group.command("show")
@click.argument("key_id", metavar="ID")
@config_option
@json_option
def key_show(key_id: str, config_path: Path | None, *, as_json: bool) -> None:
    """Show one key."""
    tell(_run(config_path, lambda directory, _: directory.key(key_id)), as_json=as_json, columns=_KEY_COLUMNS)


@key_group.command("revoke")
@click.argument("key_id", metavar="ID")
@click.option("--reason", default="", help="Why, for those who look at it later.")
@_yes_option
@config_option
@json_option
def key_revoke(key_id: str, reason: str, config_path: Path | None, *, yes: bool, as_json: bool) -> None:
    """Revoke a key for good. In force everywhere within a second."""
    _confirm(f"Revoke key {key_id}? This cannot be undone.", yes=yes)
    key = _run(config_path, lambda directory, _: directory.revoke_key(key_id, reason))
    tell(key, as_json=as_json, columns=_KEY_COLUMNS)


@key_group.command("delete")
@click.argument("key_id", metavar="ID")
@_yes_option
@config_option
@json_option
def key_delete(key_id: str, config_path: Path | None, *, yes: bool, as_json: bool) -> None:
    """Delete a key. Revoking keeps a trace that deleting does not."""
    _confirm(f"Delete key {key_id}?", yes=yes)
    done = _run(config_path, lambda directory, _: directory.delete_key(key_id))
    tell(done, as_json=as_json, columns=_KEY_COLUMNS)


def _default_life(settings: Settings) -> timedelta | None:
    return timedelta(days=settings.keys.age_days_max) if settings.keys.age_days_max else None
