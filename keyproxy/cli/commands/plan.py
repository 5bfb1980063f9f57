"""keyproxy plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import click

from keyproxy.cli.context import PAGE, Call, all_pages, confirm, takes_call, yes_option
from keyproxy.cli.output import Failure, print_message
from keyproxy.limits.limit_text import amount_text, limit_text, parse_limit, rate_per_second
from keyproxy.limits.plan import LIMIT_MAX, NO_LIMITS, REQUEST_RATE, SPEND, InvalidPlanError, Limit, Plan
from keyproxy.limits.plans.plan_changes import Change, change_to, changed_plan, differences, plan_warnings, removal_of
from keyproxy.store.directory.directory import Entity

_COLUMNS: Final = ("id", "limits", "tenants", "users", "keys", "agents", "grants")

#: Removes a limit.
_NONE: Final = "none"

#: Options for a limit of this name, and their help.
_SHORTHANDS: Final = {
    "concurrency": ("concurrency", "Maximum number of requests in flight."),
    "requests_per_day": ("requests/day", "Requests per calendar day, UTC."),
    "requests_per_month": ("requests/month", "Requests per calendar month, UTC."),
    "tokens_per_request": ("tokens/request", "LLM tokens per request."),
    "tokens_per_day": ("tokens/day", "LLM tokens per calendar day, UTC."),
    "tokens_per_month": ("tokens/month", "LLM tokens per calendar month, UTC."),
}
_LIMIT_HELP: Final = (
    "MEASURE/PER[@SELECTOR,...]=AMOUNT, such as tokens/day=1000000, spend/month@model:gpt-4o=50.00, concurrency=8,"
    " request-rate=50/s:100 or token-rate=100000/min. =none removes the limit. Repeatable."
)

_name_argument = click.argument("name", metavar="NAME")


def _limits(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, Change]]:
    return [_change(value) for value in values]


def _change(text: str) -> tuple[str, Change]:
    """The name of a limit, and the change that a text in the form of --limit means."""
    try:
        name, limit = parse_limit(text)
    except InvalidPlanError as error:
        raise click.BadParameter(str(error)) from error
    return name, removal_of(name) if limit is None else change_to(limit)


def _shorthand(_context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, Change] | None:
    return None if value is None else _change(f"{_SHORTHANDS[str(parameter.name)][0]}={value}")


def _rate(_context: click.Context, _parameter: click.Parameter, value: str | None) -> Change | None:
    """The change of --rate, which keeps the burst."""
    if value is None or value == _NONE:
        return None if value is None else {"amount": None}
    try:
        (limit,) = Plan(rate=rate_per_second(value)).limits
    except InvalidPlanError as error:
        raise click.BadParameter(str(error)) from error
    return {"per": limit.per, "amount": limit.amount}


def _burst(_context: click.Context, _parameter: click.Parameter, value: str | None) -> Change | None:
    if value is None or value == _NONE:
        return None if value is None else {"burst": None}
    digits = value.lstrip("0") or "0"
    # Check the length before parsing: int() refuses thousands of digits.
    if not value.isascii() or not value.isdigit() or len(digits) > len(str(LIMIT_MAX)):
        raise click.BadParameter(f"{value[:30]!r} is neither a whole number from 1 to {LIMIT_MAX} nor {_NONE}")
    return {"burst": int(digits)}


def _limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, (_, text) in reversed(_SHORTHANDS.items()):
        option = f"--{name.replace('_', '-')}"
        command = click.option(option, callback=_shorthand, metavar="N|none", help=text)(command)
    command = click.option(
        "--burst",
        callback=_burst,
        metavar="N|none",
        help="Burst size in requests; requires a rate. [one second of the rate]",
    )(command)
    help_of_rate = "Request rate, such as 50/s, 3000/min or 100/h."
    command = click.option("--rate", callback=_rate, metavar="RATE|none", help=help_of_rate)(command)
    return click.option("--limit", "limits", multiple=True, callback=_limits, metavar="SPEC", help=_LIMIT_HELP)(command)


def _changes(
    limits: list[tuple[str, Change]], rate: Change | None, burst: Change | None, shorthands: Mapping[str, Any]
) -> list[Change]:
    named = [*limits, *(change for change in shorthands.values() if change is not None)]
    if rate is not None or burst is not None:
        named.append((REQUEST_RATE, {"measure": REQUEST_RATE, **(rate or {}), **(burst or {})}))
    names = [name for name, _ in named]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise click.UsageError(f"{twice[0]} is given twice")
    return [change for _, change in named]


@click.group("plan")
def plan_group() -> None:
    """Manage plans: named sets of limits."""


@plan_group.command("set")
@_name_argument
@_limit_options
@click.option("--replace", is_flag=True, help="Remove every limit that is not named.")
@takes_call
def plan_set(
    call: Call,
    name: str,
    limits: list[tuple[str, Change]],
    rate: Change | None,
    burst: Change | None,
    *,
    replace: bool,
    **shorthands: tuple[str, Change] | None,
) -> None:
    """Create or change a plan. Limits that are not named stay as they are; `none` removes one.

    Takes effect within a second. Spend is a decimal number in units of money.

    \b
    keyproxy plan set basic --limit tokens/day=1000000 --limit spend/month=50.00
    keyproxy plan set basic --limit tokens/day@model:gpt-4o=200000 --limit tokens/month=none
    keyproxy plan set basic --rate 50/s --burst 100 --requests-per-day 10000
    """
    changes = _changes(limits, rate, burst, shorthands)
    if replace:
        try:
            wanted = changed_plan(NO_LIMITS, changes).to_json()
        except InvalidPlanError as error:
            raise Failure(str(error)) from error
        plan = call.run(lambda directory: directory.plans.set(name, wanted))
    else:
        plan = call.run(lambda directory: directory.plans.change(name, changes))
    after = Plan.from_json(plan["limits"])
    if call.admin_url is None:  # the admin API returns its warnings
        for warning in plan_warnings(after):
            print_message(f"warning: {warning}")
    if call.as_json:
        call.print_result(plan, ())
        return
    changed = differences(_plan_of(plan["previous"]), after)
    for limit, (old, new) in changed.items():
        click.echo(f"{limit}: {_amount(old)} -> {_amount(new)}")
    if plan["created"]:
        print_message(f"plan {name!r} created")
    elif not changed:
        print_message(f"plan {name!r} already has these limits: nothing was changed")


@plan_group.command("list")
@takes_call
def plan_list(call: Call) -> None:
    """List all plans."""
    plans = call.run(lambda directory: all_pages(lambda after: directory.plans.list_by_id(after, PAGE)))
    rows = [{**plan, "limits": [limit_text(one) for one in _plan_of(plan["limits"]).limits]} for plan in plans]
    call.print_result(plans if call.as_json else rows, _COLUMNS)


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


def _plan_of(limits: object) -> Plan:
    """The previous limits; none if the plan is new, or another SQL client wrote them in no known form."""
    try:
        return NO_LIMITS if limits is None else Plan.from_json(limits)
    except InvalidPlanError:
        return NO_LIMITS


def _amount(limit: Limit | None) -> str:
    return _NONE if limit is None else amount_text(limit)


def _tell(call: Call, plan: Entity) -> None:
    """Print one plan, with a line for each limit."""
    if call.as_json:
        call.print_result(plan, ())
        return
    units = {SPEND: call.money_unit}
    rows = {
        limit.name: f"{amount_text(limit)} {units.get(limit.measure, '')}".rstrip()
        for limit in _plan_of(plan["limits"]).limits
    }
    others = {name: value for name, value in plan.items() if name not in ("id", "limits")}
    call.print_result({"id": plan["id"], **rows, **others}, ())
