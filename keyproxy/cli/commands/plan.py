"""keyproxy plan."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, cast

import click

from keyproxy.cli.context import PAGE, Call, all_pages, confirm, takes_call, yes_option
from keyproxy.cli.output import print_message
from keyproxy.limits.limit_text import rate_per_second
from keyproxy.limits.plan import LIMIT_MAX, LIMITS, InvalidPlanError
from keyproxy.store.directory.directory import Entity

_COLUMNS: Final = ("id", *LIMITS)

#: Removes a limit.
_NONE: Final = "none"
_NUMBER = re.compile(r"[0-9]+")
_HELP: Final = {
    "burst": "Burst size in requests; requires a rate. [one second of the rate]",
    "concurrency": "Maximum number of requests in flight.",
    "requests_per_day": "Requests per calendar day, UTC.",
    "requests_per_month": "Requests per calendar month, UTC.",
    "tokens_per_request": "LLM tokens per request.",
    "tokens_per_day": "LLM tokens per calendar day, UTC.",
    "tokens_per_month": "LLM tokens per calendar month, UTC.",
}

_name_argument = click.argument("name", metavar="NAME")


def _rate(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | str | None:
    try:
        return value if value in (None, _NONE) else rate_per_second(value)
    except InvalidPlanError as error:
        raise click.BadParameter(str(error)) from error


def _whole(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == _NONE:
        return value
    if not _NUMBER.fullmatch(value):
        raise click.BadParameter(f"{value!r} is neither a whole number, such as 1000, nor {_NONE}")
    digits = value.lstrip("0") or "0"
    # Check the length before parsing: int() refuses thousands of digits.
    if len(digits) > len(str(LIMIT_MAX)) or int(digits) > LIMIT_MAX:
        raise click.BadParameter(f"the number is too large: at most {LIMIT_MAX}")
    return int(digits)


def _limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name in reversed(LIMITS[1:]):
        option = f"--{name.replace('_', '-')}"
        command = click.option(option, callback=_whole, metavar="N|none", help=_HELP[name])(command)
    help_of_rate = "Request rate, such as 50/s, 3000/min or 100/h."
    return click.option("--rate", callback=_rate, metavar="RATE|none", help=help_of_rate)(command)


@click.group("plan")
def plan_group() -> None:
    """Manage plans: named sets of limits."""


@plan_group.command("set")
@_name_argument
@_limit_options
@click.option("--replace", is_flag=True, help="Remove every limit that is not named.")
@takes_call
def plan_set(call: Call, name: str, *, replace: bool, **limits: float | str | None) -> None:
    """Create or change a plan. Limits that are not named stay as they are; `none` removes one.

    Takes effect within a second.

    \b
    keyproxy plan set basic --rate 50/s --burst 100 --requests-per-day 10000
    keyproxy plan set basic --requests-per-day 20000 --tokens-per-day none
    """
    changes = {
        limit: None if value == _NONE else cast("float", value) for limit, value in limits.items() if value is not None
    }
    if replace:
        limits_set = {limit: value for limit, value in changes.items() if value is not None}
        plan = call.run(lambda directory: directory.plans.set(name, limits_set))
    else:
        plan = call.run(lambda directory: directory.plans.change(name, changes))
    if call.as_json:
        call.print_result(plan, ())
        return
    changed = plan.pop("changed")
    for limit, change in changed.items():
        plan[limit] = f"{_shown(limit, change['old'])} -> {_shown(limit, change['new'])}"
    _tell(call, plan)
    if not changed and not plan["created"]:
        print_message(f"plan {name!r} already has these limits: nothing was changed")


@plan_group.command("list")
@takes_call
def plan_list(call: Call) -> None:
    """List all plans."""
    plans = call.run(lambda directory: all_pages(lambda after: directory.plans.list_by_id(after, PAGE)))
    call.print_result(plans if call.as_json else [{**plan, **_row(plan)} for plan in plans], _COLUMNS)


@plan_group.command("show")
@_name_argument
@takes_call
def plan_show(call: Call, name: str) -> None:
    """Show one plan, and how many tenants, users and keys use it."""
    _tell(call, call.run(lambda directory: directory.plans.get(name)))


@plan_group.command("delete")
@_name_argument
@yes_option
@takes_call
def plan_delete(call: Call, name: str, *, yes: bool) -> None:
    """Delete a plan that no tenant, user or key uses."""
    confirm(f"Delete plan {name}?", yes=yes)
    call.print_result(call.run(lambda directory: directory.plans.delete(name)), _COLUMNS)


def _shown(name: str, limit: float | None) -> str:
    if limit is None:
        return _NONE
    return f"{limit:g}/s" if name == "rate" else str(limit)


def _row(plan: Entity) -> dict[str, str]:
    """The limits of a plan, as people write them."""
    return {name: _shown(name, limit) for name, limit in plan["limits"].items() if limit is not None}


def _tell(call: Call, plan: Entity) -> None:
    call.print_result(plan if call.as_json else {"id": plan["id"], **_row(plan), **plan}, _COLUMNS)
