"""keyproxy agent token|explain|revoke: the tokens of agents."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

import click

from keyproxy.auth.minting import BUDGET_MAX
from keyproxy.auth.names import is_agent
from keyproxy.cli.commands.agents.agent import agent_name
from keyproxy.cli.commands.keys.explain import print_explanation, question_of, question_options
from keyproxy.cli.context import Call, takes_call
from keyproxy.cli.output import print_message, showing_secret
from keyproxy.cli.parameters import role, scopes, span
from keyproxy.store.directory.agents.agent_tokens import TOKEN_ID
from keyproxy.store.directory.agents.agents import AGENT_ID_RULE

_TOKEN_COLUMNS: Final = (
    "id", "agent", "user", "tenant", "key", "scopes", "token_budget", "request_budget", "expires_at", "revoked_at",
)  # fmt: skip


@click.command("token", short_help="Mint a token for an agent from a key.")
@click.option("--key", "key_id", required=True, metavar="KEY_ID", help="The key that the token is cut from.")
@click.option("--agent", required=True, callback=agent_name, metavar="AGENT", help="The agent that gets the token.")
@click.option(
    "--role", "role_wanted", callback=role, metavar="ROLE", help="The scopes of a role, as far as the key has them."
)
@click.option(
    "--scope", "wanted", multiple=True, callback=scopes, metavar="SCOPE", help="A scope that the key has; repeatable."
)
@click.option(
    "--token-budget",
    type=click.IntRange(0, BUDGET_MAX),
    metavar="N",
    help="How many tokens of models it may use. [no limit of its own]",
)
@click.option(
    "--request-budget",
    type=click.IntRange(0, BUDGET_MAX),
    metavar="N",
    help="How many requests it may make. [no limit of its own]",
)
@click.option("--ttl", callback=span, metavar="TIME", help="Lifetime, at most 15m. [access.agent_ttl_seconds]")
@click.option("--audience", metavar="NAME", help="One of access.audiences. [the first of them]")
@click.option("--act-for", metavar="USER", help="The user that the key acts for. [the key's owner]")
@takes_call
def agent_token(
    call: Call,
    key_id: str,
    agent: str,
    role_wanted: str | None,
    wanted: tuple[str, ...],
    *,
    token_budget: int | None,
    request_budget: int | None,
    ttl: timedelta | None,
    audience: str | None,
    act_for: str | None,
) -> None:
    """Mint a token for an agent. It has no more rights than the key, and ends with it.

    The key needs no scope for this. The agent is created by its first token.

    \b
    keyproxy agent token --key key_… --agent crawler --role reader --token-budget 10000 --ttl 15m
    keyproxy agent token --key key_… --agent crawler --scope data:read --act-for u_42
    """
    if (role_wanted is None) is not bool(wanted):
        raise click.UsageError("pass either --role or --scope")
    wish: dict[str, Any] = {
        "agent": agent,
        "role": role_wanted,
        "scopes": list(wanted) or None,
        "token_budget": token_budget,
        "request_budget": request_budget,
        "ttl_seconds": None if ttl is None else int(ttl.total_seconds()),
        "audience": audience,
    }
    given = {name: value for name, value in wish.items() if value is not None}
    minted = call.run_to_mint(lambda directory: directory.agent_tokens.mint(key_id, given, act_for=act_for))
    with showing_secret(f"the token {minted['id']} is lost: `keyproxy agent revoke {minted['id']}`, then mint another"):
        call.print_result(minted, _TOKEN_COLUMNS)
    if not call.as_json:
        print_message("this is the only time the token is shown")


@click.command("revoke", short_help="Revoke one agent token, or all tokens of an agent.")
@click.argument("subject", metavar="TOKEN_ID|AGENT")
@click.option("--user", "user_id", metavar="USER", help="The user of the agent whose tokens are revoked.")
@click.option("--reason", default="", help="The reason, kept with the tokens.")
@click.option("--yes", is_flag=True, hidden=True)
@takes_call
def agent_revoke(call: Call, subject: str, user_id: str | None, reason: str, *, yes: bool) -> None:
    """Revoke an agent token permanently, or with --user all live tokens of an agent. Does not ask for confirmation.

    The tokens that were minted from them end with them. Takes effect everywhere within a second. An agent can get new
    tokens afterwards: see `keyproxy agent disable`.

    \b
    keyproxy agent revoke agt_… --reason "seen in a log"
    keyproxy agent revoke crawler --user u_42
    """
    del yes
    if user_id is None:
        if TOKEN_ID.fullmatch(subject) is None:
            raise click.UsageError(
                f"{subject!r} is not the id of a token, which is agt_ and 22 letters and digits; to revoke all tokens of"
                " an agent, pass --user"
            )
        revoked = call.run(lambda directory: directory.agent_tokens.revoke(subject, reason))
    else:
        if not is_agent(subject):
            raise click.UsageError(f"{subject!r} is not a valid agent: {AGENT_ID_RULE}")
        revoked = call.run(lambda directory: directory.agents.revoke_tokens(user_id, subject, reason))
    call.print_result(revoked, _TOKEN_COLUMNS)


@click.command("explain", short_help="Show whether a request with an agent token would be accepted, and why.")
@click.argument("token_id", metavar="TOKEN_ID")
@question_options
@takes_call
def agent_explain(call: Call, token_id: str, method: str, path: str, **options: Any) -> None:
    """Show whether a request with an agent token would be accepted. Nothing is charged or sent.

    The output includes the user and the actor, the scopes and budgets of the token and of those that it was cut from, the
    scopes in effect, and the state of each limit. The options are those of `keyproxy key explain`.

    \b
    keyproxy agent explain agt_…
    keyproxy agent explain agt_… --path /v1/ai/jobs --tokens 2000
    """
    question = question_of(method, path, **options)
    print_explanation(call, question, call.run_usage(lambda usage: usage.explained_token(token_id, question)))
