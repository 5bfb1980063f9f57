"""keyproxy user."""

from __future__ import annotations

import click

from keyproxy.cli.context import (
    PAGE,
    USER_COLUMNS,
    Call,
    all_pages,
    chosen_plan,
    confirm,
    plan_arguments,
    say,
    takes_call,
    yes_option,
)
from keyproxy.cli.options import scopes, showing_secret

_id_argument = click.argument("user_id", metavar="ID")


@click.group("user")
def user_group() -> None:
    """Manage users: the accounts that own keys."""


@user_group.command("create")
@_id_argument
@click.option("--tenant", "tenant_id", required=True, metavar="TENANT", help="The user's tenant.")
@click.option("--plan", metavar="PLAN", help="The plan that limits the user.")
@click.option("--no-key", is_flag=True, help="Do not issue a first key.")
@click.option(
    "--scope", "wanted", multiple=True, callback=scopes, metavar="SCOPE", help="A scope of the first key; repeatable."
)
@takes_call
def user_create(
    call: Call, user_id: str, tenant_id: str, plan: str | None, wanted: tuple[str, ...], *, no_key: bool
) -> None:
    """Create a user and issue its first live key. An existing user is left unchanged and gets no key.

    \b
    keyproxy user create u_42 --tenant acme --scope jobs:write
    """
    wish = None if no_key else call.wish("", wanted, None)
    run = call.run if no_key else call.run_for_secret
    user = run(lambda directory: directory.create_user(user_id, tenant_id, wish, plan=plan))
    key = user["key"]
    if key is None:
        call.tell(user, USER_COLUMNS)
    else:
        again = f"`keyproxy key issue --user {user_id}`"
        lost = (
            f"user {user_id} was created, and the secret of key {key['id']} is lost: `keyproxy key revoke {key['id']}`"
        )
        with showing_secret(f"{lost}, then {again}"):
            call.tell(user, USER_COLUMNS)
    if call.as_json:
        return
    if not user["created"]:
        say(f"user {user_id!r} already exists and was not changed; it got no key: use `keyproxy key issue`")
    if key is not None:
        with showing_secret(f"{lost}, then {again}"):
            click.echo()
        call.tell_secret(key, again)


@user_group.command("list")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only this tenant's users.")
@takes_call
def user_list(call: Call, tenant_id: str | None) -> None:
    """List users."""
    rows = call.run(lambda directory: all_pages(lambda after: directory.users(after, PAGE, tenant_id)))
    call.tell(rows, USER_COLUMNS)


@user_group.command("show")
@_id_argument
@takes_call
def user_show(call: Call, user_id: str) -> None:
    """Show one user."""
    call.tell(call.run(lambda directory: directory.user(user_id)), USER_COLUMNS)


@user_group.command("set-plan")
@_id_argument
@plan_arguments
@click.option(
    "--test",
    "is_test",
    is_flag=True,
    help="Set the plan for test traffic; without one, test traffic has the live plan's limits.",
)
@takes_call
def user_set_plan(call: Call, user_id: str, plan: str | None, named: str | None, *, none: bool, is_test: bool) -> None:
    """Set or remove a user's plan. Takes effect within a second.

    \b
    keyproxy user set-plan u_42 basic
    keyproxy user set-plan u_42 --none
    """
    change = {"test_plan" if is_test else "plan": chosen_plan(plan, named, none=none)}
    call.tell(call.run(lambda directory: directory.change_user(user_id, change)), USER_COLUMNS)


@user_group.command("disable")
@_id_argument
@takes_call
def user_disable(call: Call, user_id: str) -> None:
    """Refuse all keys of a user until it is enabled. Takes effect within a second."""
    call.tell(call.run(lambda directory: directory.change_user(user_id, {"disabled": True})), USER_COLUMNS)


@user_group.command("enable")
@_id_argument
@takes_call
def user_enable(call: Call, user_id: str) -> None:
    """Accept the keys of a disabled user again."""
    call.tell(call.run(lambda directory: directory.change_user(user_id, {"disabled": False})), USER_COLUMNS)


@user_group.command("delete")
@_id_argument
@yes_option
@takes_call
def user_delete(call: Call, user_id: str, *, yes: bool) -> None:
    """Delete a user with all its keys. The audit log keeps their last state."""
    confirm(f"Delete user {user_id} with all its keys?", yes=yes)
    call.tell(call.run(lambda directory: directory.delete_user(user_id)), USER_COLUMNS)
