"""keyproxy role."""

from __future__ import annotations

from typing import Final

import click

from keyproxy.cli.context import PAGE, Call, all_pages, confirm, takes_call, yes_option
from keyproxy.cli.output import print_message
from keyproxy.cli.parameters import role, scopes

_COLUMNS: Final = ("id", "scopes", "tenants", "users", "keys", "agents")

_name_argument = click.argument("name", metavar="NAME", callback=role)


@click.group("role")
def role_group() -> None:
    """Manage roles: named sets of scopes.

    A key has the scopes of its roles. The roles of a user or tenant are a ceiling: its keys may do no more.

    \b
    keyproxy role set reader --scope jobs:read
    keyproxy key set-roles key_… --role reader
    keyproxy tenant set-roles acme --role reader
    """


@role_group.command("set")
@_name_argument
@click.option("--scope", "wanted", multiple=True, callback=scopes, metavar="SCOPE", help="A permission; repeatable.")
@click.option("--none", "none", is_flag=True, help="No scopes: the role grants nothing.")
@takes_call
def role_set(call: Call, name: str, wanted: tuple[str, ...], *, none: bool) -> None:
    """Create a role, or replace all of its scopes. Takes effect within a second.

    \b
    keyproxy role set reader --scope jobs:read --scope models:read
    """
    if bool(wanted) is none:
        raise click.UsageError("pass the scopes with --scope, or --none")
    made = call.run(lambda directory: directory.roles.set(name, wanted))
    call.print_result(made, _COLUMNS)
    if made["created"] and not call.as_json:
        print_message(f"role {name!r} created")


@role_group.command("list")
@takes_call
def role_list(call: Call) -> None:
    """List all roles."""
    call.print_result(
        call.run(lambda directory: all_pages(lambda after: directory.roles.list_by_id(after, PAGE))), _COLUMNS
    )


@role_group.command("show")
@_name_argument
@takes_call
def role_show(call: Call, name: str) -> None:
    """Show one role, and how many tenants, users and keys have it."""
    call.print_result(call.run(lambda directory: directory.roles.get(name)), _COLUMNS)


@role_group.command("delete")
@_name_argument
@yes_option
@takes_call
def role_delete(call: Call, name: str, *, yes: bool) -> None:
    """Delete a role that no tenant, user or key has."""
    confirm(f"Delete role {name}?", yes=yes)
    call.print_result(call.run(lambda directory: directory.roles.delete(name)), _COLUMNS)
