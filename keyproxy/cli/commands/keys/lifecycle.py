"""keyproxy key: one key at a time. Many at once are `key_bulk`'s."""

from __future__ import annotations

from datetime import timedelta

import click

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
from keyproxy.cli.options import duration, grace, scopes, span
from keyproxy.store.directory.directory import Entity, KeyFilter
from keyproxy.store.directory.interface import Operations
from keyproxy.store.directory.keys import ORDERS, STATES

_id_argument = click.argument("key_id", metavar="ID")


@click.group("key")
def key_group() -> None:
    """Keys: the secrets that workers present. A secret is shown once, when it is made."""


@key_group.command("issue")
@click.option("--user", "user_id", required=True, metavar="USER", help="The user it belongs to.")
@click.option("--test", "is_test", is_flag=True, help="A test key: its traffic is told apart everywhere.")
@click.option("--scope", "wanted", multiple=True, callback=scopes, metavar="SCOPE", help="What it may do; repeatable.")
@click.option("--name", default="", help="A name for people.")
@click.option("--expires-in", callback=duration, metavar="TIME", help="Such as 90d or 24h; never. [keys.age_days_max]")
@click.option("--plan", metavar="PLAN", help="Limits of this key, beside its user's and its tenant's.")
@takes_call
def key_issue(
    call: Call, user_id: str, wanted: tuple[str, ...], name: str, expires_in: timedelta | str | None,
    plan: str | None, *, is_test: bool,
) -> None:  # fmt: skip
    """Issue a key.

    \b
    keyproxy key issue --user u_42 --scope jobs:write --name nightly
    keyproxy key issue --user u_42 --test --expires-in 7d
    """
    wish = call.wish(name, wanted, expires_in, is_test=is_test, plan=plan)
    key = call.run_for_secret(lambda directory: directory.issue_key(user_id, wish))
    call.tell_secret(key, "issue another one")


@key_group.command("list")
@click.option("--user", "user_id", metavar="USER", help="Only this user's.")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only this tenant's.")
@click.option("--test/--live", "is_test", default=None, help="Only of this mode.")
@click.option("--state", type=click.Choice(STATES), help="Only in this state.")
@click.option("--older-than", callback=span, metavar="TIME", help="Only what was issued longer ago than that.")
@click.option("--expires-within", callback=span, metavar="TIME", help="Only what expires within that time, or has.")
@click.option("--sort", "order", type=click.Choice(ORDERS), help="By when issued, last used or expiring, oldest first.")
@takes_call
def key_list(
    call: Call, user_id: str | None, tenant_id: str | None, state: str | None, older_than: timedelta | None,
    expires_within: timedelta | None, order: str | None, *, is_test: bool | None,
) -> None:  # fmt: skip
    """List keys, without their secrets, which nobody has.

    \b
    keyproxy key list --state active --expires-within 14d --sort expires
    """
    wanted = KeyFilter(
        user_id, tenant_id, is_test, state, older_than=older_than, expires_within=expires_within
    )  # fmt: skip
    call.tell(call.run(lambda directory: _listed(directory, wanted, order)), KEY_COLUMNS)


@key_group.command("stale", short_help="List working keys that were not used for some time.")
@click.option("--unused", required=True, callback=span, metavar="TIME", help="Not used for so long, such as 30d.")
@click.option("--user", "user_id", metavar="USER", help="Only this user's.")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only this tenant's.")
@takes_call
def key_stale(call: Call, unused: timedelta, user_id: str | None, tenant_id: str | None) -> None:
    """List the keys that work and were not used for some time, or since they were issued.

    \b
    keyproxy key stale --unused 30d
    """

    async def work(directory: Operations) -> list[Entity]:
        wanted = KeyFilter(user_id, tenant_id, unused_for=unused)
        return [key for key in await _listed(directory, wanted, "used") if key["state"] not in ("expired", "revoked")]

    call.tell(call.run(work), KEY_COLUMNS)


@key_group.command("show")
@_id_argument
@takes_call
def key_show(call: Call, key_id: str) -> None:
    """Show one key."""
    call.tell(call.run(lambda directory: directory.key(key_id)), KEY_COLUMNS)


@key_group.command("set-plan")
@_id_argument
@plan_arguments
@takes_call
def key_set_plan(call: Call, key_id: str, plan: str | None, named: str | None, *, none: bool) -> None:
    """Give a key a plan of its own. In force within a second."""
    change = {"plan": chosen_plan(plan, named, none=none)}
    call.tell(call.run(lambda directory: directory.change_key(key_id, change)), KEY_COLUMNS)


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
    change = {"scopes": list(wanted)}
    call.tell(call.run(lambda directory: directory.change_key(key_id, change)), KEY_COLUMNS)


@key_group.command("rotate")
@_id_argument
@click.option("--grace", "left", default="24h", show_default=True, callback=grace, metavar="TIME",
              help="How long the old key goes on working; 0s: not at all.")  # fmt: skip
@click.option("--expires-in", callback=duration, metavar="TIME", help="The new key's life. [keys.age_days_max]")
@takes_call
def key_rotate(call: Call, key_id: str, left: timedelta, expires_in: timedelta | str | None) -> None:
    """Issue a new key in place of one. The old one goes on working until the grace ends.

    Scopes, mode, plan and name go on; the two draw on the same limits. A key that never expires is replaced by one that
    never expires.

    \b
    keyproxy key rotate key_… --grace 24h
    """
    life = call.life(expires_in)
    key = call.run_for_secret(lambda directory: directory.rotate_key(key_id, grace=left, expires_in=life))
    call.tell_secret(key, f"rotate {key_id} again")


@key_group.command("revoke")
@_id_argument
@click.option("--reason", default="", help="Why, for those who look at it later.")
@click.option("--yes", is_flag=True, hidden=True)
@takes_call
def key_revoke(call: Call, key_id: str, reason: str, *, yes: bool) -> None:
    """Revoke a key for good. In force everywhere within a second. Never asks: on that day seconds count."""
    del yes
    call.tell(call.run(lambda directory: directory.revoke_key(key_id, reason)), KEY_COLUMNS)


@key_group.command("delete")
@_id_argument
@yes_option
@takes_call
def key_delete(call: Call, key_id: str, *, yes: bool) -> None:
    """Delete a key. Revoking keeps a trace that deleting does not."""
    confirm(f"Delete key {key_id}?", yes=yes)
    call.tell(call.run(lambda directory: directory.delete_key(key_id)), KEY_COLUMNS)


async def _listed(directory: Operations, wanted: KeyFilter, order: str | None) -> list[Entity]:
    if order is None:
        return await all_pages(lambda after: directory.keys(after, PAGE, wanted))
    found: list[Entity] = []
    cursor: str | None = None
    while True:
        page = await directory.keys_by_time(order, cursor, PAGE, wanted)
        found += page.items
        cursor = page.next
        if cursor is None:
            return found
