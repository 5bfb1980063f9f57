"""keyproxy tenant."""

from __future__ import annotations

import click

from keyproxy.cli.commands.account import AccountKind, add_account_commands
from keyproxy.cli.context import PAGE, TENANT_COLUMNS, Call, all_pages, takes_call
from keyproxy.cli.output import print_message

_id_argument = click.argument("tenant_id", metavar="ID")


@click.group("tenant")
def tenant_group() -> None:
    """Manage tenants: the customer organisations."""


@tenant_group.command("create")
@_id_argument
@click.option("--name", default="", help="A descriptive name.")
@click.option("--plan", metavar="PLAN", help="The plan that limits the whole tenant.")
@takes_call
def tenant_create(call: Call, tenant_id: str, name: str, plan: str | None) -> None:
    """Create a tenant. An existing tenant is left unchanged.

    \b
    keyproxy tenant create acme --name "Acme Ltd"
    """
    tenant = call.run(lambda directory: directory.tenants.create(tenant_id, name, plan))
    call.print_result(tenant, TENANT_COLUMNS)
    if not call.as_json and not tenant["created"]:
        print_message(f"tenant {tenant_id!r} already exists and was not changed")


@tenant_group.command("list")
@takes_call
def tenant_list(call: Call) -> None:
    """List all tenants."""
    rows = call.run(lambda directory: all_pages(lambda after: directory.tenants.list_by_id(after, PAGE)))
    call.print_result(rows, TENANT_COLUMNS)


add_account_commands(
    tenant_group,
    AccountKind(
        noun="tenant",
        columns=TENANT_COLUMNS,
        contents="users and keys",
        examples=(
            "keyproxy tenant set-plan acme basic",
            "keyproxy tenant set-plan acme sandbox --test",
            "keyproxy tenant set-plan acme --none",
        ),
        ceiling_example="keyproxy tenant set-roles acme --role reader --role writer",
        operations=lambda directory: directory.tenants,
    ),
)
