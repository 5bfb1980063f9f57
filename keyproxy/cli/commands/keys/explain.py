"""keyproxy key explain."""

from __future__ import annotations

from typing import Final

import click

from keyproxy.cli.context import Call, takes_call
from keyproxy.limits.plan import LIMIT_MAX
from keyproxy.store.ledger.explain import Question

LIMIT_COLUMNS: Final = (
    "owner",
    "policy",
    "limit",
    "spent",
    "held",
    "forfeited",
    "remaining",
    "reset_seconds",
)


@click.command("explain", short_help="Show whether a request with a key would be accepted, and why.")
@click.argument("key_id", metavar="ID")
@click.option("--method", default="POST", show_default=True, metavar="METHOD", help="Method of the request.")
@click.option("--path", required=True, metavar="PATH", help="Path of the request, such as /v1/ai/jobs.")
@click.option("--tokens", type=click.IntRange(0, LIMIT_MAX), metavar="N", help="Maximum tokens of prompt and response.")
@takes_call
def key_explain(call: Call, key_id: str, method: str, path: str, tokens: int | None) -> None:
    """Show whether a request with a key would be accepted, and the state of each limit. Nothing is charged or sent.

    Without --tokens, a request on a route that counts tokens is treated as one without a maximum.

    \b
    keyproxy key explain key_… --method POST --path /v1/ai/jobs --tokens 2000
    """
    question = Question(method, path, tokens)
    explanation = call.run_usage(lambda usage: usage.explained(key_id, question))
    limits = explanation.pop("limits")
    subject = {name: explanation.pop(name) for name in ("key", "user", "tenant", "mode")}
    shown = {**subject, "method": method, "path": path, **explanation}
    if call.as_json:
        call.print_result({**shown, "limits": limits}, ())
        return
    call.print_result(shown, ())
    if limits:
        click.echo()
        call.print_result(limits, (*LIMIT_COLUMNS, "refuses"))
