"""keyproxy key explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Final

import click

from keyproxy.cli.context import Call, takes_call
from keyproxy.limits.limit_text import money_text
from keyproxy.limits.plan import LIMIT_MAX, SPEND
from keyproxy.store.ledger.explain import Question

_RESERVATION: Final = ("model", "input", "output", "cap", "price")
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


@click.command("explain", short_help="Show whether a request with a key would be accepted, and why.")
@click.argument("key_id", metavar="ID")
@click.option("--method", default="POST", show_default=True, metavar="METHOD", help="Method of the request.")
@click.option("--path", required=True, metavar="PATH", help="Path of the request, such as /v1/ai/jobs.")
@click.option("--tokens", type=click.IntRange(0, LIMIT_MAX), metavar="N", help="Maximum tokens of prompt and response.")
@click.option("--model", default="", metavar="NAME", help="Model of the request; replaces the model in --body.")
@click.option("--category", "categories", multiple=True, metavar="NAME", help="Category of the prompt; repeatable.")
@click.option("--namespace", "namespaces", multiple=True, metavar="SOURCE=VALUE", help="Value of a bound source.")
@click.option("--body", type=click.File("rb"), metavar="FILE", help="Body of the request; - is stdin.")
@takes_call
def key_explain(
    call: Call,
    key_id: str,
    method: str,
    path: str,
    *,
    tokens: int | None,
    model: str,
    categories: tuple[str, ...],
    namespaces: tuple[str, ...],
    body: BinaryIO | None,
) -> None:
    """Show whether a request with a key would be accepted, and the state of each limit. Nothing is charged or sent.

    Without --tokens and --body, a request on a route that counts tokens is treated as one without a maximum. With --body,
    the output includes the tokens of input and output that it reserves, the output cap that is inserted, and the price
    of the reservation.

    On a route that judges models, categories or namespaces, pass what the request would contain. Values that are not
    passed count as absent.

    \b
    keyproxy key explain key_… --method POST --path /v1/ai/jobs --tokens 2000
    keyproxy key explain key_… --path /v1/chat/completions --model gpt-4o --body request.json
    keyproxy key explain key_… --path /v1/search --namespace query:collection=acme/docs
    """
    if body is not None and tokens is not None:
        raise click.UsageError("pass either --tokens or --body")
    question = Question(
        method, path, tokens, model,
        body=None if body is None else body.read(),
        categories=categories,
        namespaces=tuple([_namespace(one) for one in namespaces]),
    )  # fmt: skip
    explanation = call.run_usage(lambda usage: usage.explained(key_id, question))
    limits = explanation.pop("limits")
    subject = {name: explanation.pop(name) for name in ("key", "user", "tenant", "mode")}
    shown = {**subject, "method": method, "path": path, **explanation}
    if call.as_json:
        call.print_result({**shown, "limits": limits}, ())
        return
    categories_shown, binds = shown.pop("categories"), shown.pop("binds")
    call.print_result(_readable(shown, call.money_unit), ())
    for rows, columns in ((categories_shown, ("name", "source")), (binds, ("value", "rule", "text", "holds"))):
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
    """The explanation as people read it: money as decimals, and no reservation where no body was read."""
    if explanation["input"] is None:
        absent = [name for name in _RESERVATION if explanation[name] is None]
        return {name: value for name, value in explanation.items() if name not in absent}
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
