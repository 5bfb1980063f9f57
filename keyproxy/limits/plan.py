"""A plan: a set of limits. Both JSON forms in which it is stored.

    {"rate": 50.0, "tokens_per_day": 1000000}                                         the object, by the names in `LIMITS`
    [{"measure": "tokens", "per": "week", "amount": 1000000, "model": "gpt-4o"}, ...] the array, for any limits

The object is written wherever it can express the plan. Every limit is optional; a missing limit does not restrict.
Windows are calendar periods in UTC; weeks begin on Monday. Zero is a limit like any other: it refuses every request.
Money is in micro-units. `limit_text` has the text form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

#: The largest whole number of a limit: the largest Integer of RFC 9651, which `RateLimit` is made of.
LIMIT_MAX: Final = 10**15 - 1

#: The table takes one more in an object, which is read as LIMIT_MAX.
_STORED_MAX: Final = LIMIT_MAX + 1

#: The most limits of one plan.
LIMITS_MAX: Final = 32

REQUESTS: Final = "requests"
TOKENS: Final = "tokens"
SPEND: Final = "spend"
CONCURRENCY: Final = "concurrency"
REQUEST_RATE: Final = "request-rate"
TOKEN_RATE: Final = "token-rate"  # noqa: S105 - tokens of a language model

PERIODS: Final = ("minute", "hour", "day", "week", "month")
PER_REQUEST: Final = "request"

#: A window that never ends. Only a budget has it, which no stored plan is: see `budgets`.
TOTAL: Final = "total"

#: The interval of a rate in seconds.
INTERVAL_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}

#: What `per` may be in a stored plan, by measure.
PERS: Final[Mapping[str, tuple[str, ...]]] = {
    REQUESTS: PERIODS,
    TOKENS: (*PERIODS, PER_REQUEST),
    SPEND: (*PERIODS, PER_REQUEST),
    CONCURRENCY: ("",),
    REQUEST_RATE: tuple(INTERVAL_SECONDS),
    TOKEN_RATE: tuple(INTERVAL_SECONDS),
}

#: What `per` may be, by measure, in the order of limits within a plan.
_PERS: Final = {**PERS, REQUESTS: (*PERS[REQUESTS], TOTAL), TOKENS: (*PERS[TOKENS], TOTAL)}
MODES: Final = ("live", "test")

#: The names of the object's limits that count in windows or per request.
_NAMED: Final = {
    "concurrency": (CONCURRENCY, ""),
    "requests_per_day": (REQUESTS, "day"),
    "requests_per_month": (REQUESTS, "month"),
    "tokens_per_request": (TOKENS, PER_REQUEST),
    "tokens_per_day": (TOKENS, "day"),
    "tokens_per_month": (TOKENS, "month"),
}

#: The names of the object's limits. `rate` is in requests per second.
LIMITS: Final = ("rate", "burst", *_NAMED)

_RATE_MIN: Final = 1 / 86_400
_RATES_MAX: Final = {REQUEST_RATE: 1_000_000.0, TOKEN_RATE: 100_000_000.0}

#: The burst of a rate that sets none, as the time in which it is replenished.
_BURST_SECONDS: Final = {REQUEST_RATE: 1, TOKEN_RATE: 60}

_FIELDS: Final = ("measure", "per", "amount", "burst", "model", "route", "mode")
_MODEL: Final = re.compile(r"[A-Za-z0-9._:/@-]{1,128}")
#: A comma separates selectors; quotes and backslashes need escapes in header fields.
_ROUTE: Final = re.compile(r'[^,"\\\x00-\x1f\x7f-\U0010ffff]{1,128}')


class InvalidPlanError(ValueError):
    """An invalid set of limits. The message describes the fault in one line."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit: `amount` of `measure` per `per`, for requests with this `model`, `route` and `mode` (empty: any).

    `per`: one of PERS[measure], or TOTAL. A rate has an interval and a `burst` (None: what one second of requests, or one
    minute of tokens, replenishes). The `amount` of a request rate may have a fraction.
    """

    measure: str
    per: str
    amount: float
    burst: int | None = None
    model: str = ""
    route: str = ""
    mode: str = ""

    def __post_init__(self) -> None:
        """Raises InvalidPlanError."""
        if self.measure not in PERS:
            raise InvalidPlanError(f"{self.measure!r}: there is no such measure; there are {', '.join(PERS)}")
        if self.per not in _PERS[self.measure]:
            raise InvalidPlanError(_wrong_period(self.measure, self.per))
        self._check_selector()
        name = self.name
        amount, burst = self.amount, self.burst
        if self.is_rate:
            most = _RATES_MAX[self.measure]
            if not _RATE_MIN <= amount / INTERVAL_SECONDS[self.per] <= most:
                raise InvalidPlanError(f"{name}: must be from 1/d to {most:.0f}/s")
            if burst is not None and not 1 <= burst <= LIMIT_MAX:
                raise InvalidPlanError(f"{name}: the burst must be a whole number from 1 to {LIMIT_MAX}")
        elif burst is not None:
            raise InvalidPlanError(f"{name}: only a rate has a burst")
        if self.measure != REQUEST_RATE and not (amount == math.floor(amount) and 0 <= amount <= LIMIT_MAX):
            raise InvalidPlanError(f"{name}: must be a whole number from 0 to {LIMIT_MAX}")

    def _check_selector(self) -> None:
        if self.mode and self.mode not in MODES:
            raise InvalidPlanError(f"mode: must be {' or '.join(MODES)}, not {self.mode!r}")
        if self.model and not _MODEL.fullmatch(self.model):
            raise InvalidPlanError("model: must be 1 to 128 letters, digits and . _ : / @ -")
        if self.route and not _ROUTE.fullmatch(self.route):
            raise InvalidPlanError("route: must be 1 to 128 printable ASCII characters without comma, quote, backslash")

    @property
    def is_rate(self) -> bool:
        """Whether it limits a rate."""
        return self.measure in _RATES_MAX

    @property
    def selector(self) -> str:
        """The requests to which it applies, in the canonical form of the table; empty: all."""
        parts = (("mode", self.mode), ("model", self.model), ("route", self.route))
        return ",".join([f"{name}:{value}" for name, value in parts if value])

    @property
    def name(self) -> str:
        """The name in the text form: `tokens/day@model:gpt-4o`. Unique within a plan."""
        period = f"/{self.per}" if self.per and not self.is_rate else ""
        selector = self.selector
        return f"{self.measure}{period}@{selector}" if selector else f"{self.measure}{period}"

    @property
    def window_measure(self) -> str:
        """The measure of its window, and its name in policies: `tokens_per_day`, `tokens_total`, `token_rate`, `rate`."""
        if self.is_rate:
            return "rate" if self.measure == REQUEST_RATE else "token_rate"
        if self.per == TOTAL:
            return f"{self.measure}_{TOTAL}"
        return f"{self.measure}_per_{self.per}" if self.per else self.measure

    @property
    def per_second(self) -> float:
        """The units of a rate per second."""
        return self.amount / INTERVAL_SECONDS[self.per]

    @property
    def interval_seconds(self) -> float:
        """The time in which one unit of a rate is replenished; 0.0 without a rate."""
        return INTERVAL_SECONDS[self.per] / self.amount if self.is_rate else 0.0

    @property
    def whole_amount(self) -> object:
        """The amount, as an integer if it has no fraction: for JSON and text."""
        # Not `float`: compiled code would make a float of the integer.
        return int(self.amount) if self.amount == math.floor(self.amount) else self.amount

    @property
    def quota(self) -> int:
        """The largest number of units at one time: the burst of a rate, else the amount."""
        if not self.is_rate:
            return int(self.amount)
        if self.burst is not None:
            return self.burst
        return min(LIMIT_MAX, max(1, math.ceil(self.per_second * _BURST_SECONDS[self.measure])))

    def to_json(self) -> dict[str, object]:
        """An entry of the array."""
        entry: dict[str, object] = {"measure": self.measure, "per": self.per, "amount": self.whole_amount}
        if self.burst is not None:
            entry["burst"] = self.burst
        selectors = (("model", self.model), ("route", self.route), ("mode", self.mode))
        return {**entry, **{name: value for name, value in selectors if value}}


def check_period(measure: str, per: str) -> None:
    """Raise InvalidPlanError unless a stored plan may have a limit of this measure per `per`."""
    if per not in PERS[measure]:
        raise InvalidPlanError(_wrong_period(measure, per))


def _wrong_period(measure: str, per: str) -> str:
    allowed = [one for one in PERS[measure] if one]
    if not allowed:
        return f"{measure}: has no period"
    return f"{measure}: must be per {', '.join(allowed)}" + (f", not {per!r}" if per else "")


class Plan:
    """A set of limits, in a fixed order. Keywords are the names of the object: `Plan(rate=50.0, tokens_per_day=1000)`."""

    __slots__ = ("limits",)

    def __init__(self, limits: Iterable[Limit] = (), /, **named: float | None) -> None:
        """Raises InvalidPlanError."""
        ordered = sorted([*limits, *_from_names(named)], key=_position)
        if len(ordered) > LIMITS_MAX:
            raise InvalidPlanError(f"limits: at most {LIMITS_MAX} limits, not {len(ordered)}")
        for before, after in pairwise(ordered):
            if before.name == after.name:
                raise InvalidPlanError(f"{after.name}: appears twice")
        self.limits: Final = tuple(ordered)

    @property
    def has_limits(self) -> bool:
        """Whether any limit is set."""
        return bool(self.limits)

    def limit(self, name: str) -> Limit | None:
        """The limit of a name, None if there is none."""
        return next((limit for limit in self.limits if limit.name == name), None)

    def changed(self, changes: Mapping[str, Limit | None]) -> Plan:
        """The plan with these limits, by `Limit.name`, in place of its own; None removes one. Raises InvalidPlanError."""
        kept = [limit for limit in self.limits if limit.name not in changes]
        return Plan([*kept, *(limit for limit in changes.values() if limit is not None)])

    def to_json(self) -> dict[str, float] | list[dict[str, object]]:
        """The value of `plans.limits`: the object if it can express the plan, else the array."""
        named, others = self._split()
        return [limit.to_json() for limit in self.limits] if others else named

    def _split(self) -> tuple[dict[str, float], list[Limit]]:
        """The limits that the object can express, by name, and the others."""
        named: dict[str, float] = {}
        others = []
        for limit in self.limits:
            if limit.selector or not (limit.measure == REQUEST_RATE or limit.window_measure in _NAMED):
                others.append(limit)
            elif limit.measure != REQUEST_RATE:
                named[limit.window_measure] = limit.quota
            else:
                named["rate"] = float(limit.per_second)
                if limit.burst is not None:
                    named["burst"] = limit.burst
        return named, others

    def amounts(self) -> dict[str, object]:
        """The amounts of all limits: by their names in the object, the others by `Limit.name`."""
        named, others = self._split()
        return {**named, **{limit.name: limit.whole_amount for limit in others}}

    @classmethod
    def from_json(cls, limits: object) -> Plan:
        """Parse `plans.limits`. Raises InvalidPlanError."""
        if isinstance(limits, Mapping):
            return cls((), **_checked_names(limits))
        if isinstance(limits, list):
            return cls([_entry(number, entry) for number, entry in enumerate(limits, 1)])
        raise InvalidPlanError("limits: must be an object or an array")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.limits == other.limits

    def __hash__(self) -> int:
        return hash(self.limits)

    def __repr__(self) -> str:
        return f"Plan({list(self.limits)})"


def _position(limit: Limit) -> tuple[int, int, str]:
    order = tuple(PERS)
    return order.index(limit.measure), _PERS[limit.measure].index(limit.per), limit.name


def _entry(number: int, entry: object) -> Limit:
    if not isinstance(entry, Mapping):
        raise InvalidPlanError(f"limits: entry {number} must be an object")
    for name, value in entry.items():
        if name not in _FIELDS:
            raise InvalidPlanError(f"limits: entry {number}: there is no {name!r}; there are {', '.join(_FIELDS)}")
        if name in ("amount", "burst"):
            _check_number(f"limits: entry {number}: {name}", value)
        elif not isinstance(value, str):
            raise InvalidPlanError(f"limits: entry {number}: {name} must be a string")
    if "measure" not in entry or "amount" not in entry:
        raise InvalidPlanError(f"limits: entry {number} must have a measure and an amount")
    burst = entry.get("burst")
    if burst is not None and burst != int(burst):
        raise InvalidPlanError(f"limits: entry {number}: burst must be a whole number")
    measure, per = entry["measure"], entry.get("per", "")
    if measure in PERS:
        check_period(measure, per)
    return Limit(
        measure, per, entry["amount"], None if burst is None else int(burst),
        entry.get("model", ""), entry.get("route", ""), entry.get("mode", ""),
    )  # fmt: skip


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidPlanError(f"{name}: must be a number")


def _checked_names(limits: Mapping[Any, Any]) -> dict[str, Any]:
    """The limits of an object that are set."""
    checked: dict[str, Any] = {}
    for name, value in limits.items():
        if name not in LIMITS:
            raise InvalidPlanError(f"{name}: there is no such limit; there are {', '.join(sorted(LIMITS))}")
        if value is not None:
            _check_number(name, value)
            checked[name] = LIMIT_MAX if name != "rate" and value == _STORED_MAX else value
    return checked


def _from_names(named: Mapping[str, float | None]) -> list[Limit]:
    limits = []
    for name, value in named.items():
        if name not in LIMITS:
            raise InvalidPlanError(f"{name}: there is no such limit; there are {', '.join(sorted(LIMITS))}")
        least = 1 if name == "burst" else 0
        if value is not None and name != "rate" and not (value == math.floor(value) and least <= value <= LIMIT_MAX):
            raise InvalidPlanError(f"{name}: must be a whole number from {least} to {LIMIT_MAX}")
        if value is not None and name in _NAMED:
            limits.append(Limit(*_NAMED[name], int(value)))
    rate, burst = named.get("rate"), named.get("burst")
    if rate is not None:
        limits.append(_request_rate(rate, None if burst is None else int(burst)))
    elif burst is not None:
        raise InvalidPlanError("burst: means nothing without a rate")
    return limits


def _request_rate(rate: float, burst: int | None) -> Limit:
    """A rate in requests per second as a limit, with the interval in which it is a whole number."""
    if not _RATE_MIN <= rate <= _RATES_MAX[REQUEST_RATE]:
        raise InvalidPlanError(f"rate: must be from 1/d to {_RATES_MAX[REQUEST_RATE]:.0f}/s")
    for per, seconds in INTERVAL_SECONDS.items():
        whole = round(rate * seconds)
        if whole and whole / seconds == rate:
            return Limit(REQUEST_RATE, per, whole, burst)
    return Limit(REQUEST_RATE, "second", rate, burst)


NO_LIMITS: Final = Plan()
