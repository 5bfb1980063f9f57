"""keyproxy owned."""

from __future__ import annotations

from typing import Final

import click

from keyproxy.cli.context import Call, every_page, takes_call
from keyproxy.cli.parameters import role

_COLUMNS: Final = ("kind", "id", "tenant", "created_at")

_kind_argument = click.argument("kind", metavar="KIND", callback=role)
_id_argument = click.argument("object_id", metavar="ID")
_tenant_option = click.option("--tenant", "tenant_id", required=True, metavar="TENANT", help="The owner.")


@click.group("owned")
def owned_group() -> None:
    """Manage owned ids: which object belongs to which tenant.

    A route whose `binds` have `owned = "KIND"` accepts only ids of this kind that the caller's tenant owns. Ids of kind
    `model` are models that the tenant may use without a row of [[models]].

    \b
    keyproxy owned add collection docs-9 --tenant acme
    keyproxy owned list --tenant acme
    """


@owned_group.command("add")
@_kind_argument
@_id_argument
@_tenant_option
@takes_call
def owned_add(call: Call, kind: str, object_id: str, tenant_id: str) -> None:
    """Assign an id to a tenant. An id that belongs to another tenant is refused. Takes effect within a second.

    \b
    keyproxy owned add collection docs-9 --tenant acme
    """
    call.print_result(call.run(lambda directory: directory.owned.add(kind, object_id, tenant_id)), _COLUMNS)


@owned_group.command("remove")
@_kind_argument
@_id_argument
@_tenant_option
@takes_call
def owned_remove(call: Call, kind: str, object_id: str, tenant_id: str) -> None:
    """Remove an id from its tenant. Takes effect within a second.

    \b
    keyproxy owned remove collection docs-9 --tenant acme
    """
    call.print_result(call.run(lambda directory: directory.owned.remove(kind, object_id, tenant_id)), _COLUMNS)


@owned_group.command("show")
@_kind_argument
@_id_argument
@takes_call
def owned_show(call: Call, kind: str, object_id: str) -> None:
    """Show which tenant owns an id."""
    call.print_result(call.run(lambda directory: directory.owned.get(kind, object_id)), _COLUMNS)


@owned_group.command("list")
@click.option("--kind", callback=role, metavar="KIND", help="Only ids of this kind.")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only this tenant's ids.")
@takes_call
def owned_list(call: Call, kind: str | None, tenant_id: str | None) -> None:
    """List owned ids."""
    rows = call.run(
        lambda directory: every_page(
            lambda cursor, limit: directory.owned.list_page(cursor, limit, kind=kind, tenant_id=tenant_id)
        )
    )
    call.print_result(rows, _COLUMNS)
