"""keyproxy usage credit, keyproxy usage adjust."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import click

from keyproxy.cli.context import Call, takes_call
from keyproxy.cli.output import print_message
from keyproxy.limits.limit_text import money_micros, money_text, parse_limit
from keyproxy.limits.plan import LIMIT_MAX, SPEND, InvalidPlanError
from keyproxy.store.directory.directory import Credit, Entity

_WHOLE = re.compile(r"[0-9]{1,15}")
_AMOUNTS: Final = ("amount", "credited", "total", "spent", "held")


def _limit(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    try:
        name, _ = parse_limit(f"{value}=none")
    except InvalidPlanError as error:
        raise click.BadParameter(
            f"{error}; name a limit of the plan, such as tokens/day or spend/month@model:gpt-4o"
        ) from error
    return name


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--test", "is_test", is_flag=True, help="The window for test traffic."),
        click.option("--reason", required=True, metavar="TEXT", help="Why, for the audit log."),
        click.option(
            "--amount",
            required=True,
            metavar="N",
            help="A whole number; of spend a decimal number with up to six places.",
        ),
        click.option(
            "--limit",
            required=True,
            callback=_limit,
            metavar="NAME",
            help="A limit of the plan: tokens/day, spend/month@model:gpt-4o.",
        ),
        click.option("--key", metavar="ID", help="The pool of this key."),
        click.option("--tenant", metavar="ID", help="The pool of this tenant."),
        click.option("--user", metavar="ID", help="The pool of this user."),
    ):
        command = option(command)
    return command


@click.command("credit", short_help="Add to a limit for its current window.")
@_options
@takes_call
def usage_credit(call: Call, limit: str, amount: str, reason: str, *, is_test: bool, **owner: str | None) -> None:
    """Add an amount to the limit of the current window of a user, tenant or key. The next window has the plan's limit.

    Takes effect within a second, and is recorded in the audit log.

    \b
    keyproxy usage credit --user u_42 --limit tokens/day --amount 500000 --reason "ticket 811"
    keyproxy usage credit --tenant acme --limit spend/month --amount 25.00 --reason "goodwill"
    """
    _make(call, Credit(*_owner(owner), limit, _parsed(limit, amount, least=1), reason, is_test))


@click.command("adjust", short_help="Add to or subtract from a limit for its current window.")
@_options
@takes_call
def usage_adjust(call: Call, limit: str, amount: str, reason: str, *, is_test: bool, **owner: str | None) -> None:
    """As credit, with an amount that may be negative. The limit and its credits together cannot fall below 0.

    \b
    keyproxy usage adjust --user u_42 --limit tokens/day --amount -200000 --reason "credited twice"
    """
    _make(call, Credit(*_owner(owner), limit, _parsed(limit, amount, least=-LIMIT_MAX), reason, is_test))


def _owner(owners: dict[str, str | None]) -> tuple[str, str]:
    given = [(kind, owner) for kind, owner in owners.items() if owner is not None]
    if len(given) != 1:
        raise click.UsageError("pass exactly one of --user, --tenant and --key")
    return given[0]


def _parsed(limit: str, text: str, *, least: int) -> int:
    """The amount in units, of spend in micro-units."""
    sign = -1 if text.startswith("-") else 1
    digits = text[1:] if text[:1] in ("-", "+") else text
    is_money = limit.startswith(f"{SPEND}/")
    example = "an amount with up to six places, such as 25.00" if is_money else "a whole number, such as 500000"
    try:
        if not is_money and not _WHOLE.fullmatch(digits):
            raise InvalidPlanError(text)
        amount = sign * (money_micros(digits) if is_money else int(digits))
    except InvalidPlanError as error:
        raise click.BadParameter(f"{text[:40]!r} is not {example}", param_hint="--amount") from error
    if amount == 0 or amount < least:
        raise click.BadParameter(
            f"{text!r} must be more than 0" + ("; `keyproxy usage adjust` subtracts" if amount < 0 else ""),
            param_hint="--amount",
        )
    return amount


def _make(call: Call, credit: Credit) -> None:
    if not credit.reason.strip():
        raise click.BadParameter("must not be empty", param_hint="--reason")
    made = call.run(lambda directory: directory.credits.add(credit))
    call.print_result(made if call.as_json else _shown(made), ())
    if not call.as_json:
        print_message(f"the limit is {_shown(made)['total']} until {made['window_ends']}")


def _shown(made: Entity) -> Entity:
    if not made["limit"].startswith(f"{SPEND}/"):
        return made
    return {**made, **{name: money_text(made[name]) for name in _AMOUNTS}}
