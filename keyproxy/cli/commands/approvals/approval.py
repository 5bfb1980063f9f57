"""keyproxy approval: decide on calls of tools that need an approval."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import click

from keyproxy.cli.context import Call, every_page, takes_call
from keyproxy.cli.output import print_document
from keyproxy.cli.parameters import span
from keyproxy.store.directory.directory import ApprovalFilter, Entity

_COLUMNS: Final = ("id", "state", "kind", "tool", "user", "tenant", "agent", "created_at", "expires_at")
_STATES: Final = ("pending", "approved", "denied", "used", "expired")

_id_argument = click.argument("approval_id", metavar="ID")
_reason_option = click.option("--reason", default="", metavar="TEXT", help="The reason, for the audit log.")


@click.group("approval")
def approval_group() -> None:
    """Decide on calls of tools that need an approval.

    The agent repeats its request until the call is decided. An approval is valid for exactly this call, once.

    \b
    keyproxy approval list --state pending
    keyproxy approval show apr_…
    keyproxy approval approve apr_… --reason "order 4711"
    """


@approval_group.command("list")
@click.option("--state", type=click.Choice(_STATES), help="Only approvals in this state.")
@click.option("--user", "user_id", metavar="USER", help="Only calls for this user.")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only calls for users of this tenant.")
@takes_call
def approval_list(call: Call, state: str | None, user_id: str | None, tenant_id: str | None) -> None:
    """List approvals, the newest first.

    \b
    keyproxy approval list --state pending
    """
    wanted = ApprovalFilter(state, user_id, tenant_id)
    rows = call.run(
        lambda directory: every_page(lambda cursor, limit: directory.approvals.list_page(cursor, limit, wanted))
    )
    call.print_result(rows, _COLUMNS)


@approval_group.command("show", short_help="Show one approval, with the call.")
@_id_argument
@takes_call
def approval_show(call: Call, approval_id: str) -> None:
    """Show one approval, with the call: its arguments without secrets, the caller, and the client's address."""
    _print(call, call.run(lambda directory: directory.approvals.get(approval_id)))


@approval_group.command("approve", short_help="Approve a call, for one use.")
@_id_argument
@_reason_option
@click.option(
    "--consent-for", callback=span, metavar="TIME",
    help="Also grant the user's consent to the tool for this agent, for example 30d. Only for kind consent.",
)  # fmt: skip
@takes_call
def approval_approve(call: Call, approval_id: str, reason: str, consent_for: timedelta | None) -> None:
    """Approve a call. When the agent repeats it, it is forwarded once.

    The approval must be used within approvals.use_seconds.

    \b
    keyproxy approval approve apr_… --reason "order 4711"
    """
    _print(
        call,
        call.run(lambda directory: directory.approvals.approve(approval_id, reason=reason, consent_for=consent_for)),
    )


@approval_group.command("deny", short_help="Deny a call, or withdraw an approval.")
@_id_argument
@_reason_option
@takes_call
def approval_deny(call: Call, approval_id: str, reason: str) -> None:
    """Deny a call, or withdraw an approval that is not used yet. Repetitions of the call are refused for a while.

    \b
    keyproxy approval deny apr_… --reason "unknown recipient"
    """
    _print(call, call.run(lambda directory: directory.approvals.deny(approval_id, reason=reason)))


def _print(call: Call, approval: Entity) -> None:
    call.print_result(approval, _COLUMNS)
    if not call.as_json:
        print_document(approval["summary"])
