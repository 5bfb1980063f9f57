"""keyproxy agent: the agents of users. See `token` for their tokens."""

from __future__ import annotations

from typing import Final

import click

from keyproxy.auth.names import is_agent
from keyproxy.cli.command_table import CommandTable
from keyproxy.cli.context import PAGE, Call, all_pages, chosen_plan, plan_arguments, takes_call
from keyproxy.cli.parameters import roles
from keyproxy.store.directory.agents.agents import AGENT_ID_RULE

AGENT_COLUMNS: Final = ("id", "user", "tenant", "roles", "plan", "disabled_at", "created_at", "tokens")


def agent_name(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """A click callback: a validated id of an agent."""
    if not is_agent(value):
        raise click.BadParameter(f"{value!r} is not valid: {AGENT_ID_RULE}")
    return value


_agent_argument = click.argument("agent", metavar="AGENT", callback=agent_name)
_user_option = click.option(
    "--user", "user_id", required=True, metavar="USER", help="The user that the agent works for."
)


_TOKEN_COMMANDS: Final = {
    "explain": "keyproxy.cli.commands.agents.token:agent_explain",
    "revoke": "keyproxy.cli.commands.agents.token:agent_revoke",
    "token": "keyproxy.cli.commands.agents.token:agent_token",
}


@click.group("agent", cls=CommandTable, places=_TOKEN_COMMANDS)
def agent_group() -> None:
    """Manage agents and their tokens.

    An agent is a program that works for a user with tokens of its own. A token lives for at most 15 minutes and has a
    part of the scopes of the key that it is cut from. An agent is created by its first token.

    \b
    keyproxy agent token --key key_… --agent crawler --role reader --token-budget 10000
    keyproxy agent disable crawler --user u_42
    """


@agent_group.command("list", short_help="List the agents of a user.")
@_user_option
@takes_call
def agent_list(call: Call, user_id: str) -> None:
    """List the agents of a user, with the number of their live tokens."""
    rows = call.run(lambda directory: all_pages(lambda after: directory.agents.list_by_id(user_id, after, PAGE)))
    call.print_result(rows, AGENT_COLUMNS)


@agent_group.command("show")
@_agent_argument
@_user_option
@takes_call
def agent_show(call: Call, agent: str, user_id: str) -> None:
    """Show one agent."""
    call.print_result(call.run(lambda directory: directory.agents.get(user_id, agent)), AGENT_COLUMNS)


@agent_group.command("disable", short_help="Refuse all tokens of an agent until it is enabled.")
@_agent_argument
@_user_option
@takes_call
def agent_disable(call: Call, agent: str, user_id: str) -> None:
    """Decommission an agent until it is enabled: it gets no tokens, and its live ones are refused within a second.

    The tokens that were minted from its tokens are refused as well.
    """
    _change(call, agent, user_id, {"disabled": True})


@agent_group.command("enable", short_help="Let a disabled agent get tokens again.")
@_agent_argument
@_user_option
@takes_call
def agent_enable(call: Call, agent: str, user_id: str) -> None:
    """Let a disabled agent get tokens again. Those that have not expired or been revoked work again."""
    _change(call, agent, user_id, {"disabled": False})


@agent_group.command("set-roles", short_help="Set or remove an agent's ceiling.")
@_agent_argument
@_user_option
@click.option("--role", "wanted", multiple=True, callback=roles, metavar="ROLE", help="A role; repeatable.")
@click.option("--none", "none", is_flag=True, help="Allow no scopes at all.")
@click.option("--no-ceiling", is_flag=True, help="Remove the ceiling.")
@takes_call
def agent_set_roles(
    call: Call, agent: str, user_id: str, wanted: tuple[str, ...], *, none: bool, no_ceiling: bool
) -> None:
    """Set or remove an agent's ceiling. No token of the agent may do more than these roles allow.

    Tokens that were minted from its tokens are bounded as well. Takes effect within a second.

    \b
    keyproxy agent set-roles crawler --user u_42 --role reader
    """
    if bool(wanted) + none + no_ceiling != 1:
        raise click.UsageError("pass the roles with --role, or --none, or --no-ceiling")
    _change(call, agent, user_id, {"roles": None if no_ceiling else list(wanted)})


@agent_group.command("set-plan", short_help="Set or remove an agent's plan.")
@_agent_argument
@plan_arguments
@_user_option
@takes_call
def agent_set_plan(call: Call, agent: str, plan: str | None, named: str | None, user_id: str, *, none: bool) -> None:
    """Set or remove an agent's plan, which limits all its tokens together. Takes effect within a second.

    \b
    keyproxy agent set-plan crawler basic --user u_42
    """
    _change(call, agent, user_id, {"plan": chosen_plan(plan, named, none=none)})


def _change(call: Call, agent: str, user_id: str, changes: dict[str, object]) -> None:
    call.print_result(call.run(lambda directory: directory.agents.change(user_id, agent, changes)), AGENT_COLUMNS)
