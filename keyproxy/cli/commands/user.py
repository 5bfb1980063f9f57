"""keyproxy user."""

from __future__ import annotations

import click

from keyproxy.cli.commands.account import AccountKind, add_account_commands
from keyproxy.cli.context import PAGE, USER_COLUMNS, Call, all_pages, takes_call
from keyproxy.cli.output import print_message, showing_secret
from keyproxy.cli.parameters import scopes

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
    user = run(lambda directory: directory.users.create(user_id, tenant_id, wish, plan=plan))
    call.print_warnings(user)
    key = user["key"]
    if key is None:
        call.print_result(user, USER_COLUMNS)
    else:
        again = f"`keyproxy key issue --user {user_id}`"
        lost = (
            f"user {user_id} was created, and the secret of key {key['id']} is lost: `keyproxy key revoke {key['id']}`"
        )
        with showing_secret(f"{lost}, then {again}"):
            call.print_result(user, USER_COLUMNS)
    if call.as_json:
        return
    if not user["created"]:
        print_message(f"user {user_id!r} already exists and was not changed; it got no key: use `keyproxy key issue`")
    if key is not None:
        with showing_secret(f"{lost}, then {again}"):
            click.echo()
        call.print_secret(key, again)


@user_group.command("list")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only this tenant's users.")
@takes_call
def user_list(call: Call, tenant_id: str | None) -> None:
    """List users."""
    rows = call.run(lambda directory: all_pages(lambda after: directory.users.list_by_id(after, PAGE, tenant_id)))
    call.print_result(rows, USER_COLUMNS)


add_account_commands(
    user_group,
    AccountKind(
        noun="user",
        columns=USER_COLUMNS,
        contents="keys",
        examples=(
            "keyproxy user set-plan u_42 basic",
            "keyproxy user set-plan u_42 --none",
        ),
        ceiling_example="keyproxy user set-roles u_42 --role reader",
        operations=lambda directory: directory.users,
    ),
)
