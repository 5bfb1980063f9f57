"""keyproxy key: one key at a time; see `bulk` for many at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import click

from keyproxy.cli.command_table import CommandTable
from keyproxy.cli.context import (
    KEY_COLUMNS,
    PAGE,
    Call,
    all_pages,
    chosen_plan,
    confirm,
    plan_arguments,
    takes_call,
    yes_option,
)
from keyproxy.cli.parameters import duration, grace, roles, scopes, span
from keyproxy.store.directory.directory import Entity, KeyFilter
from keyproxy.store.directory.entities import ACTS_FOR, ACTS_FOR_NONE
from keyproxy.store.directory.interface import DirectoryOperations
from keyproxy.store.directory.keys import ORDERS, STATES

_id_argument = click.argument("key_id", metavar="ID")


_FURTHER_COMMANDS: Final = {
    "explain": "keyproxy.cli.commands.keys.explain:key_explain",
    "import": "keyproxy.cli.commands.keys.bulk:key_import",
    "issue-many": "keyproxy.cli.commands.keys.bulk:key_issue_many",
    "origins": "keyproxy.cli.commands.keys.suspension:key_origins",
    "remind": "keyproxy.cli.commands.keys.remind:key_remind",
    "report-leaked": "keyproxy.cli.commands.keys.leaks:key_report_leaked",
    "resume": "keyproxy.cli.commands.keys.suspension:key_resume",
    "revoke-all": "keyproxy.cli.commands.keys.bulk:key_revoke_all",
    "suspend": "keyproxy.cli.commands.keys.suspension:key_suspend",
    "whose": "keyproxy.cli.commands.keys.leaks:key_whose",
}


@click.group("key", cls=CommandTable, places=_FURTHER_COMMANDS)
def key_group() -> None:
    """Manage API keys. A key's secret is shown once, when it is created."""


@key_group.command("issue")
@click.option("--user", "user_id", required=True, metavar="USER", help="The key's owner.")
@click.option(
    "--test", "is_test", is_flag=True, help="Issue a test key: its traffic is counted and limited separately."
)
@click.option(
    "--scope",
    "wanted",
    multiple=True,
    callback=scopes,
    metavar="SCOPE",
    help="A permission, such as jobs:write; repeatable.",
)
@click.option("--role", "roles_wanted", multiple=True, callback=roles, metavar="ROLE", help="A role; repeatable.")
@click.option(
    "--acts-for",
    type=click.Choice(ACTS_FOR),
    default=ACTS_FOR_NONE,
    show_default=True,
    help="The users that the key may act for besides its owner: those of its tenant, or none.",
)
@click.option("--name", default="", help="A descriptive name.")
@click.option(
    "--expires-in",
    callback=duration,
    metavar="TIME",
    help="Lifetime, such as 90d or 24h, or never. [keys.age_days_max]",
)
@click.option("--plan", metavar="PLAN", help="Limits of this key, in addition to its user's and its tenant's.")
@takes_call
def key_issue(
    call: Call,
    user_id: str,
    wanted: tuple[str, ...],
    roles_wanted: tuple[str, ...],
    acts_for: str,
    name: str,
    expires_in: timedelta | str | None,
    plan: str | None,
    *,
    is_test: bool,
) -> None:
    """Issue a key.

    \b
    keyproxy key issue --user u_42 --scope jobs:write --name nightly
    keyproxy key issue --user u_42 --test --expires-in 7d
    keyproxy key issue --user u_worker --scope jobs:write --acts-for tenant --plan service
    """
    wish = call.wish(name, wanted, expires_in, is_test=is_test, plan=plan, roles=roles_wanted, acts_for=acts_for)
    key = call.run_for_secret(lambda directory: directory.keys.issue(user_id, wish))
    call.print_warnings(key)
    call.print_secret(key, "issue a new key")


@key_group.command("list")
@click.option("--user", "user_id", metavar="USER", help="Only this user's keys.")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only this tenant's keys.")
@click.option("--test/--live", "is_test", default=None, help="Only live or only test keys.")
@click.option("--state", type=click.Choice(STATES), help="Only keys in this state.")
@click.option("--older-than", callback=span, metavar="TIME", help="Only keys issued longer ago than this, such as 90d.")
@click.option(
    "--expires-within", callback=span, metavar="TIME", help="Only keys that expire within this time or have expired."
)
@click.option(
    "--sort", "order", type=click.Choice(ORDERS), help="Sort by time of issue, last use or expiry, oldest first."
)
@takes_call
def key_list(
    call: Call,
    user_id: str | None,
    tenant_id: str | None,
    state: str | None,
    older_than: timedelta | None,
    expires_within: timedelta | None,
    order: str | None,
    *,
    is_test: bool | None,
) -> None:
    """List keys. Their secrets are not stored and cannot be shown.

    \b
    keyproxy key list --state active --expires-within 14d --sort expires
    """
    wanted = KeyFilter(user_id, tenant_id, is_test, state, older_than=older_than, expires_within=expires_within)
    call.print_result(call.run(lambda directory: _listed(directory, wanted, order)), KEY_COLUMNS)


@key_group.command("stale", short_help="List working keys that have not been used for some time.")
@click.option("--unused", required=True, callback=span, metavar="TIME", help="Not used for this long, such as 30d.")
@click.option("--user", "user_id", metavar="USER", help="Only this user's keys.")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only this tenant's keys.")
@takes_call
def key_stale(call: Call, unused: timedelta, user_id: str | None, tenant_id: str | None) -> None:
    """List working keys that have not been used for some time; a key that was never used counts from its issue.

    \b
    keyproxy key stale --unused 30d
    """

    async def work(directory: DirectoryOperations) -> list[Entity]:
        wanted = KeyFilter(user_id, tenant_id, unused_for=unused)
        return [key for key in await _listed(directory, wanted, "used") if key["state"] not in ("expired", "revoked")]

    call.print_result(call.run(work), KEY_COLUMNS)


@key_group.command("show")
@_id_argument
@takes_call
def key_show(call: Call, key_id: str) -> None:
    """Show one key."""
    call.print_result(call.run(lambda directory: directory.keys.get(key_id)), KEY_COLUMNS)


@key_group.command("set-plan")
@_id_argument
@plan_arguments
@takes_call
def key_set_plan(call: Call, key_id: str, plan: str | None, named: str | None, *, none: bool) -> None:
    """Set or remove a key's own plan. Takes effect within a second."""
    _change(call, key_id, {"plan": chosen_plan(plan, named, none=none)})


@key_group.command("set-scopes")
@_id_argument
@click.option("--scope", "wanted", multiple=True, callback=scopes, metavar="SCOPE", help="A permission; repeatable.")
@click.option("--none", "none", is_flag=True, help="Remove all scopes.")
@takes_call
def key_set_scopes(call: Call, key_id: str, wanted: tuple[str, ...], *, none: bool) -> None:
    """Replace the scopes of a key. Takes effect everywhere within a second.

    \b
    keyproxy key set-scopes key_… --scope jobs:write --scope jobs:read
    """
    if bool(wanted) is none:
        raise click.UsageError("pass the scopes with --scope, or --none")
    call.warn_of_scopes(wanted)
    _change(call, key_id, {"scopes": list(wanted)})


@key_group.command("set-roles")
@_id_argument
@click.option("--role", "wanted", multiple=True, callback=roles, metavar="ROLE", help="A role; repeatable.")
@click.option("--none", "none", is_flag=True, help="Remove all roles.")
@takes_call
def key_set_roles(call: Call, key_id: str, wanted: tuple[str, ...], *, none: bool) -> None:
    """Replace the roles of a key. Takes effect everywhere within a second.

    \b
    keyproxy key set-roles key_… --role reader --role reporter
    """
    if bool(wanted) is none:
        raise click.UsageError("pass the roles with --role, or --none")
    _change(call, key_id, {"roles": list(wanted)})


@key_group.command("set-acts-for", short_help="Let a key act for its tenant's users, or for none.")
@_id_argument
@click.argument("acts_for", metavar="none|tenant", type=click.Choice(ACTS_FOR))
@takes_call
def key_set_acts_for(call: Call, key_id: str, acts_for: str) -> None:
    """Let a key act for the users of its tenant, or for its owner only. Takes effect everywhere within a second.

    none also ends the agent tokens that were minted with the key while it acted for a user.

    \b
    keyproxy key set-acts-for key_… tenant
    """
    _change(call, key_id, {"acts_for": acts_for})


@key_group.command("rotate")
@_id_argument
@click.option(
    "--grace",
    "left",
    default="24h",
    show_default=True,
    callback=grace,
    metavar="TIME",
    help="How long the old key keeps working; 0s: it stops immediately.",
)
@click.option("--expires-in", callback=duration, metavar="TIME", help="The new key's lifetime. [keys.age_days_max]")
@takes_call
def key_rotate(call: Call, key_id: str, left: timedelta, expires_in: timedelta | str | None) -> None:
    """Replace a key with a new one. The old key keeps working until the grace period ends.

    The new key has the same scopes, roles, acts_for, mode, plan and name, and both keys share their limits. A key that
    never expires is replaced by one that never expires.

    \b
    keyproxy key rotate key_… --grace 24h
    """
    life = call.life(expires_in)
    key = call.run_for_secret(lambda directory: directory.keys.rotate(key_id, grace=left, expires_in=life))
    call.print_secret(key, f"rotate {key_id} again")


@key_group.command("revoke")
@_id_argument
@click.option("--reason", default="", help="The reason, kept with the key.")
@click.option("--yes", is_flag=True, hidden=True)
@takes_call
def key_revoke(call: Call, key_id: str, reason: str, *, yes: bool) -> None:
    """Revoke a key permanently. Takes effect everywhere within a second. Does not ask for confirmation."""
    del yes
    call.print_result(call.run(lambda directory: directory.keys.revoke(key_id, reason)), KEY_COLUMNS)


@key_group.command("delete")
@_id_argument
@yes_option
@takes_call
def key_delete(call: Call, key_id: str, *, yes: bool) -> None:
    """Delete a key. A revoked key stays visible in lists; a deleted one does not."""
    confirm(f"Delete key {key_id}?", yes=yes)
    call.print_result(call.run(lambda directory: directory.keys.delete(key_id)), KEY_COLUMNS)


def _change(call: Call, key_id: str, changes: dict[str, object]) -> None:
    key = call.run(lambda directory: directory.keys.change(key_id, changes))
    call.print_warnings(key)
    call.print_result(key, KEY_COLUMNS)


async def _listed(directory: DirectoryOperations, wanted: KeyFilter, order: str | None) -> list[Entity]:
    if order is None:
        return await all_pages(lambda after: directory.keys.list_by_id(after, PAGE, wanted))
    found: list[Entity] = []
    cursor: str | None = None
    while True:
        page = await directory.keys.list_by_time(order, cursor, PAGE, wanted)
        found += page.items
        cursor = page.next
        if cursor is None:
            return found
