"""keyproxy consent: users consent to tools, whose calls then need no approval each."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import click

from keyproxy.auth.names import is_agent
from keyproxy.cli.context import Call, every_page, takes_call
from keyproxy.cli.output import print_message
from keyproxy.cli.parameters import span
from keyproxy.config.tools.tool_settings import consent_warnings
from keyproxy.store.directory.agents.agents import AGENT_ID_RULE
from keyproxy.store.directory.directory import ConsentFilter

_COLUMNS: Final = ("id", "state", "user", "tenant", "tool", "agent", "granted_by", "created_at", "expires_at")
_STATES: Final = ("live", "revoked", "expired")


def _agent(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not is_agent(value):
        raise click.BadParameter(f"{value!r} is not valid: {AGENT_ID_RULE}")
    return value


@click.group("consent")
def consent_group() -> None:
    """Manage the consents of users to tools.

    With a live consent, agents call a tool of kind consent for the user without an approval of each call.

    \b
    keyproxy consent grant --user u_42 --tool crm.update --agent crawler --expires-in 30d
    keyproxy consent list --user u_42
    """


@consent_group.command("grant")
@click.option("--user", "user_id", required=True, metavar="USER", help="The user that consents.")
@click.option("--tool", required=True, metavar="TOOL", help="The name of the tool.")
@click.option("--agent", callback=_agent, metavar="AGENT", help="The only agent that it is for. [any]")
@click.option("--expires-in", required=True, callback=span, metavar="TIME", help="For example 30d; at most 366 days.")
@takes_call
def consent_grant(call: Call, user_id: str, tool: str, agent: str | None, expires_in: timedelta) -> None:
    """Grant the consent of a user to a tool. Takes effect within a second.

    \b
    keyproxy consent grant --user u_42 --tool crm.update --expires-in 30d
    """
    consent = call.run(lambda directory: directory.consents.grant(user_id, tool, expires_in=expires_in, agent=agent))
    if call.admin_url is None:  # the admin API returns its warnings
        for warning in consent_warnings(call.settings().tools, tool):
            print_message(f"warning: {warning}")
    call.print_result(consent, _COLUMNS)


@consent_group.command("list")
@click.option("--state", type=click.Choice(_STATES), help="Only consents in this state.")
@click.option("--user", "user_id", metavar="USER", help="Only those of this user.")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only those of users of this tenant.")
@click.option("--tool", metavar="TOOL", help="Only those to this tool.")
@takes_call
def consent_list(call: Call, state: str | None, user_id: str | None, tenant_id: str | None, tool: str | None) -> None:
    """List consents, the newest first."""
    wanted = ConsentFilter(state, user_id, tenant_id, tool)
    rows = call.run(
        lambda directory: every_page(lambda cursor, limit: directory.consents.list_page(cursor, limit, wanted))
    )
    call.print_result(rows, _COLUMNS)


@consent_group.command("revoke")
@click.argument("consent_id", metavar="ID")
@takes_call
def consent_revoke(call: Call, consent_id: str) -> None:
    """Revoke a consent permanently. Takes effect within a second.

    \b
    keyproxy consent revoke cns_…
    """
    call.print_result(call.run(lambda directory: directory.consents.revoke(consent_id)), _COLUMNS)
