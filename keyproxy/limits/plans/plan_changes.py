"""Changes to a plan that name the limits they concern; the others stay.

    {"rate": 50.0, "tokens_per_day": null}                   by the names of the object in which plans are stored
    [{"measure": "tokens", "per": "week", "amount": 100}]    by entries of the array

A null removes a limit, in an entry as its `amount`. Members that an entry omits stay as they are, so that a burst can be
changed without its rate; a rate with a burst is removed together with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from keyproxy.limits.limit_text import limit_text
from keyproxy.limits.plan import (
    CONCURRENCY,
    LIMITS,
    PER_REQUEST,
    REQUEST_RATE,
    TOKEN_RATE,
    TOKENS,
    InvalidPlanError,
    Limit,
    Plan,
)

_RATES: Final = (REQUEST_RATE, TOKEN_RATE)
_SELECTORS: Final = ("model", "route", "mode")
_FIELDS: Final = ("measure", "per", "amount", "burst", *_SELECTORS)

#: The measure and period of each name of the object but `rate` and `burst`.
_NAMED: Final = {
    name: (CONCURRENCY, "") if name == CONCURRENCY else (name.split("_per_")[0], name.split("_per_")[1])
    for name in LIMITS
    if name not in ("rate", "burst")
}

#: One change, as an entry of the array.
Change = Mapping[str, Any]


def changed_plan(plan: Plan, changes: object) -> Plan:
    """The plan with these changes, in either form. Raises InvalidPlanError."""
    if isinstance(changes, Mapping):
        return _apply(plan, _from_names(changes))
    if isinstance(changes, Sequence) and not isinstance(changes, str):
        return _apply(plan, [_checked(number, entry) for number, entry in enumerate(changes, 1)])
    raise InvalidPlanError("limits: must be an object or an array")


def change_to(limit: Limit) -> Change:
    """The change that sets this limit, with the default burst if it has none."""
    return {**limit.to_json(), **({"burst": limit.burst} if limit.is_rate else {})}


def removal_of(name: str) -> Change:
    """The change that removes the limit of this `Limit.name`."""
    name, _, selectors = name.partition("@")
    measure, _, per = name.partition("/")
    chosen = dict(one.split(":", 1) for one in selectors.split(",") if one)
    burst = {"burst": None} if measure in _RATES else {}
    return {"measure": measure, **({"per": per} if per else {}), **chosen, "amount": None, **burst}


def differences(before: Plan, after: Plan) -> dict[str, tuple[Limit | None, Limit | None]]:
    """The old and the new value of each limit that differs, by `Limit.name`; None: no such limit."""
    was = {limit.name: limit for limit in before.limits}
    now = {limit.name: limit for limit in after.limits}
    names = [*now, *(name for name in was if name not in now)]
    return {name: (was.get(name), now.get(name)) for name in names if was.get(name) != now.get(name)}


def named_amounts(plan: Plan) -> dict[str, float]:
    """The amounts of a plan by name: those of the object, and `tokens_per_week`, `token_rate`, `token_burst` and so on.

    A selector follows: `tokens_per_day@model:gpt-4o`. Rates are per second.
    """
    amounts: dict[str, float] = {}
    for limit in plan.limits:
        suffix = f"@{limit.selector}" if limit.selector else ""
        amounts[limit.window_measure + suffix] = limit.per_second if limit.is_rate else limit.quota
        if limit.burst is not None:
            amounts[limit.window_measure.replace("rate", "burst") + suffix] = limit.burst
    return amounts


def _from_names(changes: Mapping[str, object]) -> list[Change]:
    unknown = [name for name in changes if name not in LIMITS]
    if unknown:
        raise InvalidPlanError(f"{unknown[0]}: there is no such limit; there are {', '.join(sorted(LIMITS))}")
    # Reads the values as those of a plan, so that both refuse the same ones.
    given = {name: value for name, value in changes.items() if value is not None}
    Plan.from_json({"rate": 1.0, **given} if "burst" in given else given)
    entries: list[Change] = []
    for name, value in changes.items():
        if name in _NAMED:
            measure, per = _NAMED[name]
            entries.append({"measure": measure, "per": per, "amount": value})
    rate = {new: changes[old] for old, new in (("rate", "amount"), ("burst", "burst")) if old in changes}
    return [*entries, {"measure": REQUEST_RATE, "per": "second", **rate}] if rate else entries


def _checked(number: int, entry: object) -> Change:
    if not isinstance(entry, Mapping):
        raise InvalidPlanError(f"limits: entry {number} must be an object")
    unknown = [name for name in entry if name not in _FIELDS]
    if unknown:
        raise InvalidPlanError(f"limits: entry {number}: there is no {unknown[0]!r}; there are {', '.join(_FIELDS)}")
    if "measure" not in entry or not entry.keys() & {"amount", "burst"}:
        raise InvalidPlanError(f"limits: entry {number} must have a measure and an amount")
    return entry


def _apply(plan: Plan, changes: Sequence[Change]) -> Plan:
    limits = {limit.name: limit for limit in plan.limits}
    named: set[str] = set()
    for change in changes:
        name = _name(change)
        if name in named:
            raise InvalidPlanError(f"{name}: appears twice")
        named.add(name)
        merged = _merged(limits.pop(name, None), change)
        if merged is not None:
            limits[name] = merged
    return Plan(limits.values())


def _name(change: Change) -> str:
    measure = change["measure"]
    per = change.get("per") or ("second" if measure in _RATES else "")
    (limit,) = Plan.from_json([{**_selector(change), "measure": measure, "per": per, "amount": 1}]).limits
    return limit.name


def _merged(old: Limit | None, change: Change) -> Limit | None:
    """The limit after a change; None: it is removed."""
    entry: dict[str, Any] = {} if old is None else dict(old.to_json())
    entry |= {"measure": change["measure"], **_selector(change), **change}
    if entry.get("amount") is None:
        if entry.get("burst") is not None:
            raise InvalidPlanError("burst: means nothing without a rate")
        return None
    if entry["measure"] in _RATES and not entry.get("per"):
        entry["per"] = "second"
    (limit,) = Plan.from_json([{name: value for name, value in entry.items() if value is not None}]).limits
    return limit


def _selector(change: Change) -> dict[str, Any]:
    return {name: change[name] for name in _SELECTORS if change.get(name)}


def plan_warnings(plan: Plan) -> list[str]:
    """A sentence for each limit per request that exceeds a window: requests that reserve all of it never fit."""
    found = []
    for limit in plan.limits:
        smaller = [one for one in plan.limits if limit.per == PER_REQUEST and _counts_with(one, limit)]
        smallest = min(smaller, key=_quota, default=limit)
        if smallest.quota < limit.quota:
            found.append(
                f"{limit_text(limit)} exceeds {limit_text(smallest)}: requests that reserve all of it, such as tunnels"
                " and requests without a maximum, are always refused"
            )
    return found


def _counts_with(window: Limit, per_request: Limit) -> bool:
    """Whether a request under a limit per request may count in this window too."""
    measure = TOKENS if window.measure == TOKEN_RATE else window.measure
    if measure != per_request.measure or window.per == PER_REQUEST:
        return False
    pairs = ((getattr(window, name), getattr(per_request, name)) for name in _SELECTORS)
    return all(not one or not other or one == other for one, other in pairs)


def _quota(limit: Limit) -> int:
    return limit.quota
