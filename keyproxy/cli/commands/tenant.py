"""keyproxy tenant."""

from __future__ import annotations

import click

from keyproxy.cli.context import (
    PAGE,
    TENANT_COLUMNS,
    Call,
    all_pages,
    chosen_plan,
    confirm,
    plan_arguments,
    say,
    takes_call,
    yes_option,
)

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
    tenant = call.run(lambda directory: directory.create_tenant(tenant_id, name, plan))
    call.tell(tenant, TENANT_COLUMNS)
    if not call.as_json and not tenant["created"]:
        say(f"tenant {tenant_id!r} already exists and was not changed")


@tenant_group.command("list")
@takes_call
def tenant_list(call: Call) -> None:
    """List all tenants."""
    call.tell(
        call.run(lambda directory: all_pages(lambda after: directory.tenants(after, PAGE))), TENANT_COLUMNS
    )  # fmt: skip


@tenant_group.command("show")
@_id_argument
@takes_call
def tenant_show(call: Call, tenant_id: str) -> None:
    """Show one tenant."""
    call.tell(call.run(lambda directory: directory.tenant(tenant_id)), TENANT_COLUMNS)


@tenant_group.command("set-plan")
@_id_argument
@plan_arguments
@click.option(
    "--test",
    "is_test",
    is_flag=True,
    help="Set the plan for test traffic; without one, test traffic has the live plan's limits.",
)
@takes_call
def tenant_set_plan(
    call: Call, tenant_id: str, plan: str | None, named: str | None, *, none: bool, is_test: bool
) -> None:
    """Set or remove a tenant's plan. Takes effect within a second.

    \b
    keyproxy tenant set-plan acme basic
    keyproxy tenant set-plan acme sandbox --test
    keyproxy tenant set-plan acme --none
    """
    change = {"test_plan" if is_test else "plan": chosen_plan(plan, named, none=none)}
    call.tell(call.run(lambda directory: directory.change_tenant(tenant_id, change)), TENANT_COLUMNS)


@tenant_group.command("disable")
@_id_argument
@takes_call
def tenant_disable(call: Call, tenant_id: str) -> None:
    """Refuse all keys of a tenant until it is enabled. Takes effect within a second."""
    call.tell(
        call.run(lambda directory: directory.change_tenant(tenant_id, {"disabled": True})), TENANT_COLUMNS
    )  # fmt: skip


@tenant_group.command("enable")
@_id_argument
@takes_call
def tenant_enable(call: Call, tenant_id: str) -> None:
    """Accept the keys of a disabled tenant again."""
    call.tell(
        call.run(lambda directory: directory.change_tenant(tenant_id, {"disabled": False})), TENANT_COLUMNS
    )  # fmt: skip


@tenant_group.command("delete")
@_id_argument
@yes_option
@takes_call
def tenant_delete(call: Call, tenant_id: str, *, yes: bool) -> None:
    """Delete a tenant with all its users and keys. The audit log keeps their last state."""
    confirm(f"Delete tenant {tenant_id} with all its users and keys?", yes=yes)
    call.tell(call.run(lambda directory: directory.delete_tenant(tenant_id)), TENANT_COLUMNS)
