"""A plan: a named set of limits, as stored and as counted.

Every limit is optional; a missing limit does not restrict. Windows are calendar days and months in UTC. Zero is a limit
like any other: it refuses every request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

#: The largest whole number of a limit: the largest Integer of RFC 9651, which `RateLimit` is made of.
LIMIT_MAX: Final = 10**15 - 1

#: The table takes one more, which is read as LIMIT_MAX.
_STORED_MAX: Final = LIMIT_MAX + 1

_RATE_MIN: Final = 1 / 86_400
_RATE_MAX: Final = 1_000_000.0
_UNITS_SECONDS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_TOO_LARGE_RATE = re.compile(r"[0-9]{10}")
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(?:/(s|m|min|h|d))?")


class InvalidPlanError(ValueError):
    """An invalid set of limits. The message describes the fault in one line."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Limits by name. None: no such limit.

    `rate` is in requests per second, `burst` the number of requests admitted at once (None: one second's worth),
    `concurrency` the number of requests in flight at one time.
    """

    rate: float | None = None
    burst: int | None = None
    concurrency: int | None = None
    requests_per_day: int | None = None
    requests_per_month: int | None = None
    tokens_per_request: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None

    def __post_init__(self) -> None:
        """Raises InvalidPlanError."""
        if self.rate is not None and not _RATE_MIN <= self.rate <= _RATE_MAX:
            raise InvalidPlanError(f"rate: must be from 1/d to {_RATE_MAX:.0f}/s")
        if self.burst is not None and self.rate is None:
            raise InvalidPlanError("burst: means nothing without a rate")
        for name in _WHOLE:
            value: int | None = getattr(self, name)
            least = 1 if name == "burst" else 0
            if value is not None and not least <= value <= LIMIT_MAX:
                raise InvalidPlanError(f"{name}: must be a whole number from {least} to {LIMIT_MAX}")

    @property
    def burst_requests(self) -> int:
        """The number of requests that `rate` admits at once."""
        if self.burst is not None:
            return self.burst
        return max(1, math.ceil(self.rate)) if self.rate is not None else 0

    @property
    def has_limits(self) -> bool:
        """Whether any limit is set."""
        return self != NO_LIMITS

    def to_json(self) -> dict[str, float | int]:
        """The limits that are set, by name: the format of `plans.limits`."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @classmethod
    def from_json(cls, limits: object) -> Plan:
        """Parse `plans.limits`. Raises InvalidPlanError."""
        if not isinstance(limits, Mapping):
            raise InvalidPlanError("limits: must be an object")
        known = {field.name for field in fields(cls)}
        for name, value in limits.items():
            if name not in known:
                raise InvalidPlanError(f"{name}: there is no such limit; there are {', '.join(sorted(known))}")
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InvalidPlanError(f"{name}: must be a number")
            if name != "rate" and value != int(value):
                raise InvalidPlanError(f"{name}: must be a whole number")
        whole = {name: int(value) for name, value in limits.items() if value is not None and name != "rate"}
        whole = {name: LIMIT_MAX if value == _STORED_MAX else value for name, value in whole.items()}
        rate = limits.get("rate")
        return cls(rate=None if rate is None else float(rate), **whole)


#: Every limit.
LIMITS: Final = tuple(field.name for field in fields(Plan))

_WHOLE: Final = tuple(name for name in LIMITS if name != "rate")

NO_LIMITS: Final = Plan()


def rate_per_second(text: str) -> float:
    """Parse a rate: `50/s`, `3000/min`, `10/h`, `50`. Raises InvalidPlanError."""
    match = _RATE.fullmatch(text.strip())
    if match is None and _TOO_LARGE_RATE.match(text.strip()):
        raise InvalidPlanError(f"{text!r} is too large a rate: at most {_RATE_MAX:.0f}/s")
    if match is None:
        raise InvalidPlanError(f"{text!r} is no rate: write it as 50/s, 3000/min, 100/h or 1000/d")
    return float(match[1]) / _UNITS_SECONDS[match[2] or "s"]
