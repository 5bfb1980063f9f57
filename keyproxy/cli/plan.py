"""keyproxy plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final

import click

from keyproxy.cli.desk import PAGE, Call, all_pages, confirm, takes_call, yes_option
from keyproxy.limits.plan import InvalidPlanError, Plan, rate_per_second
from keyproxy.store.directory import Entity

_LIMITS: Final = tuple(field.name for field in fields(Plan))
_COLUMNS: Final = ("id", *_LIMITS)
_HELP: Final = {
    "burst": "How many requests may come at once under the rate. [one second's worth]",
    "concurrency": "How many requests may be under way at one time.",
    "requests_per_day": "Per calendar day, UTC.",
    "requests_per_month": "Per calendar month, UTC.",
    "tokens_per_request": "LLM tokens of one request.",
    "tokens_per_day": "LLM tokens per calendar day, UTC.",
    "tokens_per_month": "LLM tokens per calendar month, UTC.",
}

_name_argument = click.argument("name", metavar="NAME")


def _rate(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else rate_per_second(value)
    except InvalidPlanError as error:
        raise click.BadParameter(str(error)) from error


def _limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name in reversed(_LIMITS[1:]):
        option = f"--{name.replace('_', '-')}"
        command = click.option(option, type=click.IntRange(min=0), metavar="N", help=_HELP[name])(command)
    return click.option("--rate", callback=_rate, metavar="RATE", help="Such as 50/s, 3000/min, 100/h.")(command)


@click.group("plan")
def plan_group() -> None:
    """Plans: named sets of limits, given to tenants, users and keys."""


@plan_group.command("set")
@_name_argument
@_limit_options
@takes_call
def plan_set(call: Call, name: str, **limits: float | None) -> None:
    """Make a plan, or make it another one: it is what is said here, all of it. In force within a second.

    \b
    keyproxy plan set basic --rate 50/s --burst 100 --requests-per-day 10000
    """
    said = {limit: value for limit, value in limits.items() if value is not None}
    _tell(call, call.run(lambda directory: directory.set_plan(name, said)))


@plan_group.command("list")
@takes_call
def plan_list(call: Call) -> None:
    """List all plans."""
    plans = call.run(lambda directory: all_pages(lambda after: directory.plans(after, PAGE)))
    call.tell(plans if call.as_json else [{**plan, **plan["limits"]} for plan in plans], _COLUMNS)


@plan_group.command("show")
@_name_argument
@takes_call
def plan_show(call: Call, name: str) -> None:
    """Show one plan, and how many tenants, users and keys have it."""
    _tell(call, call.run(lambda directory: directory.plan(name)))


@plan_group.command("delete")
@_name_argument
@yes_option
@takes_call
def plan_delete(call: Call, name: str, *, yes: bool) -> None:
    """Delete a plan that nobody has."""
    confirm(f"Delete plan {name}?", yes=yes)
    call.tell(call.run(lambda directory: directory.delete_plan(name)), _COLUMNS)


def _tell(call: Call, plan: Entity) -> None:
    call.tell(plan if call.as_json else {"id": plan["id"], **plan["limits"], **plan}, _COLUMNS)
