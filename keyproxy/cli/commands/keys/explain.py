"""keyproxy key explain, and what `keyproxy agent explain` shares with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Final

import click

from keyproxy.cli.context import Call, takes_call
from keyproxy.limits.limit_text import money_text
from keyproxy.limits.plan import LIMIT_MAX, SPEND
from keyproxy.store.ledger.explain import Question

_ACTORS: Final = ("actor", "agent", "agent_token", "actor_ceiling")
_TOOL: Final = ("tool", "approval", "missing")
_RESERVATION: Final = ("model", "input", "output", "cap", "price")
#: Lists of an explanation, with their columns.
_TABLES: Final = {
    "chain": ("agent", "token", "scopes", "ceiling", "token_budget", "request_budget"),
    "categories": ("name", "source"),
    "binds": ("value", "rule", "text", "holds"),
}
_MONEY: Final = ("limit", "credited", "spent", "held", "forfeited", "remaining")

LIMIT_COLUMNS: Final = (
    "owner",
    "policy",
    "selector",
    "limit",
    "credited",
    "spent",
    "held",
    "forfeited",
    "remaining",
    "reset_seconds",
    "unit",
)


def question_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a request to explain."""
    for option in (
        click.option("--body", type=click.File("rb"), metavar="FILE", help="Body of the request; - is stdin."),
        click.option(
            "--namespace", "namespaces", multiple=True, metavar="SOURCE=VALUE", help="Value of a bound source."
        ),
        click.option(
            "--category", "categories", multiple=True, metavar="NAME", help="Category of the prompt; repeatable."
        ),
        click.option(
            "--client-certificate", is_flag=True, help="A verified certificate of the client is on the connection."
        ),
        click.option(
            "--tool", default="", metavar="NAME", help="Tool that it calls, where the route does not name it."
        ),
        click.option("--model", default="", metavar="NAME", help="Model of the request; replaces the model in --body."),
        click.option(
            "--tokens", type=click.IntRange(0, LIMIT_MAX), metavar="N", help="Maximum tokens of prompt and response."
        ),
        click.option(
            "--path",
            default="",
            metavar="PATH",
            help="Path of the request, such as /v1/ai/jobs. Omitted: only the credential and its limits are explained.",
        ),
        click.option("--method", default="POST", show_default=True, metavar="METHOD", help="Method of the request."),
    ):
        command = option(command)
    return command


def question_of(
    method: str,
    path: str,
    *,
    tokens: int | None,
    model: str,
    categories: Sequence[str],
    namespaces: Sequence[str],
    body: BinaryIO | None,
    tool: str = "",
    client_certificate: bool = False,
    act_for: str | None = None,
) -> Question:
    """The question that the options ask. Raises UsageError."""
    if body is not None and tokens is not None:
        raise click.UsageError("pass either --tokens or --body")
    if not path and (body is not None or tokens is not None or model or categories or namespaces):
        raise click.UsageError("--tokens, --model, --category, --namespace and --body require --path")
    return Question(
        method, path, tokens, model,
        body=None if body is None else body.read(),
        categories=tuple(categories),
        namespaces=tuple([_namespace(one) for one in namespaces]),
        act_for=act_for,
        tool=tool,
        has_certificate=client_certificate,
    )  # fmt: skip


@click.command("explain", short_help="Show whether a request with a key would be accepted, and why.")
@click.argument("key_id", metavar="ID")
@question_options
@click.option("--act-for", metavar="USER", help="The user that the key acts for. [the key's owner]")
@takes_call
def key_explain(call: Call, key_id: str, method: str, path: str, **options: Any) -> None:
    """Show whether a request with a key would be accepted, and the state of each limit. Nothing is charged or sent.

    Without --tokens and --body, a request on a route that counts tokens is treated as one without a maximum. With --body,
    the output includes the tokens of input and output that it reserves, the output cap that is inserted, and the price
    of the reservation.

    On a route that judges models, categories or namespaces, pass what the request would contain. Values that are not
    passed count as absent. On an MCP route, --tool or --body names the tool.

    \b
    keyproxy key explain key_… --method POST --path /v1/ai/jobs --tokens 2000
    keyproxy key explain key_… --path /v1/chat/completions --model gpt-4o --body request.json
    keyproxy key explain key_… --path /v1/search --namespace query:collection=acme/docs
    keyproxy key explain key_… --path /mcp --tool update_contact
    keyproxy key explain key_… --act-for u_42 --path /v1/ai/jobs
    """
    question = question_of(method, path, **options)
    print_explanation(call, question, call.run_usage(lambda usage: usage.explained(key_id, question)))


def print_explanation(call: Call, question: Question, explanation: dict[str, Any]) -> None:
    """Print the decision on a request, and the state of each limit."""
    limits = explanation.pop("limits")
    # An older admin API returns neither actors nor a chain.
    subject = {
        name: explanation.pop(name, None) for name in ("key", "user", "tenant", "mode", "actor", "agent", "agent_token")
    }
    shown = {**subject, "method": question.method, "path": question.path or None, **explanation}
    if call.as_json:
        call.print_result({**shown, "limits": limits}, ())
        return
    tables = [(shown.pop(name, ()), columns) for name, columns in _TABLES.items()]
    call.print_result(_readable(shown, call.money_unit), ())
    for rows, columns in tables:
        if rows:
            click.echo()
            call.print_result(rows, columns)
    if limits:
        click.echo()
        call.print_result(shown_limits(limits, call.money_unit), (*LIMIT_COLUMNS, "refuses"))


def _namespace(text: str) -> tuple[str, str]:
    source, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} is not SOURCE=VALUE", param_hint="--namespace")
    return source, value


def _readable(explanation: Mapping[str, Any], money_unit: str) -> dict[str, Any]:
    """The explanation as people read it: money as decimals, and neither a reservation where no body was read, nor actors
    or a tool where there are none."""
    absent = [name for name in (*_ACTORS, *_TOOL) if explanation.get(name) is None]
    if explanation["input"] is None:
        absent += [name for name in _RESERVATION if explanation[name] is None]
    explanation = {name: value for name, value in explanation.items() if name not in absent}
    if "price" not in explanation:
        return dict(explanation)
    price = explanation["price"]
    return {**explanation, "price": None if price is None else f"{money_text(price)} {money_unit}".rstrip()}


def shown_limits(limits: Sequence[Mapping[str, Any]], money_unit: str) -> list[dict[str, Any]]:
    """The state of limits as people read it: the selector beside the policy, money as decimals, with its unit."""
    return [_shown(limit, money_unit) for limit in limits]


def _shown(limit: Mapping[str, Any], money_unit: str) -> dict[str, Any]:
    policy: str = limit["policy"].partition("@")[0]
    shown = {**limit, "policy": policy}
    if policy.partition(".")[2].startswith(SPEND):
        shown |= {name: money_text(limit[name]) for name in _MONEY if limit.get(name) is not None}
        shown["unit"] = money_unit
    return shown
