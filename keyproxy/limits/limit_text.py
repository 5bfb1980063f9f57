"""Limits as people write them: `tokens/day@model:gpt-4o=1000000`, `spend/month=50.00`, `request-rate=50/s:100`.

    MEASURE/PER[@SELECTOR,...]=AMOUNT     requests, tokens, spend per minute, hour, day, week, month; tokens and spend
                                          also per request
    concurrency[@SELECTOR,...]=AMOUNT
    request-rate[@SELECTOR,...]=AMOUNT/INTERVAL[:BURST]     also token-rate; INTERVAL: s, min, h, d

A selector is `model:NAME`, `route:NAME` or `mode:live|test`. `=none` removes a limit. Spend has up to six decimal places.
"""

from __future__ import annotations

import re
from typing import Final

from keyproxy.limits.plan import (
    INTERVAL_SECONDS,
    LIMIT_MAX,
    PERS,
    REQUEST_RATE,
    SPEND,
    TOKEN_RATE,
    InvalidPlanError,
    Limit,
    check_period,
)

NONE: Final = "none"

_MICROS: Final = 1_000_000
_MICRO_PLACES: Final = 6
_INTERVALS: Final = {"s": "second", "m": "minute", "min": "minute", "h": "hour", "d": "day"}
_SHORT: Final = {"second": "s", "minute": "min", "hour": "h", "day": "d"}
_RATE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,18})?)(?:/(s|m|min|h|d))?(?::([0-9]{1,16}))?")
_TOO_LARGE_RATE = re.compile(r"[0-9]{16}")
_WHOLE = re.compile(r"[0-9]+")
_MONEY = re.compile(r"([0-9]+)(?:\.([0-9]{1,6}))?")
_EXAMPLE: Final = "write a limit as tokens/day=1000000, spend/month=50.00, concurrency=8 or request-rate=50/s:100"


def parse_limit(text: str) -> tuple[str, Limit | None]:
    """Parse one limit. Returns its canonical `Limit.name`, and the limit; None if it is removed (`=none`).

    Raises InvalidPlanError.
    """
    name, separator, amount = text.strip().rpartition("=")
    if not separator or not name:
        raise InvalidPlanError(f"{text!r} is no limit: {_EXAMPLE}")
    name, _, selectors = name.partition("@")
    measure, slash, per = name.partition("/")
    if measure not in PERS:
        raise InvalidPlanError(f"{measure!r} is no measure; there are {', '.join(PERS)}")
    is_rate = measure in (REQUEST_RATE, TOKEN_RATE)
    if is_rate and slash:
        raise InvalidPlanError(f"{measure}: the interval belongs to the amount, such as {measure}=50/s")
    if not is_rate:
        check_period(measure, per)
    chosen = _selectors(selectors, text) if selectors or "@" in text.rpartition("=")[0] else {}
    if amount == NONE:
        return Limit(measure, "second" if is_rate else per, 1, None, **chosen).name, None
    if is_rate:
        rate, interval, burst = _rate(measure, amount)
        limit = Limit(measure, interval, rate, burst, **chosen)
    else:
        whole = _money(measure, amount) if measure == SPEND else _whole(measure, amount)
        limit = Limit(measure, per, whole, None, **chosen)
    return limit.name, limit


def amount_text(limit: Limit) -> str:
    """The amount of a limit as `parse_limit` reads it: `1000000`, `50.00`, `50/s:100`."""
    if limit.measure == SPEND:
        return money_text(limit.quota)
    if not limit.is_rate:
        return str(limit.quota)
    amount = repr(limit.whole_amount)
    if "e" in amount:
        amount = f"{limit.amount:.18f}".rstrip("0")
    burst = "" if limit.burst is None else f":{limit.burst}"
    return f"{amount}/{_SHORT[limit.per]}{burst}"


def limit_text(limit: Limit) -> str:
    """A limit as `parse_limit` reads it."""
    return f"{limit.name}={amount_text(limit)}"


def money_text(micros: int) -> str:
    """Micro-units as a decimal with two to six places."""
    sign = "-" if micros < 0 else ""
    whole, fraction = divmod(abs(micros), _MICROS)
    places = f"{fraction:06d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{places}"


def money_micros(text: str) -> int:
    """Parse a decimal with up to six places into micro-units. Raises InvalidPlanError."""
    return _money(SPEND, text)


def rate_per_second(text: str) -> float:
    """Parse a rate: `50/s`, `3000/min`, `10/h`, `50`. Raises InvalidPlanError."""
    match = _RATE.fullmatch(text.strip())
    if match is None or match[3] is not None:
        raise _no_rate("rate", text)
    return float(match[1]) / INTERVAL_SECONDS[_INTERVALS[match[2] or "s"]]


def _selectors(text: str, whole: str) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for one in text.split(","):
        kind, colon, value = one.partition(":")
        if kind not in ("model", "route", "mode") or not colon or not value:
            raise InvalidPlanError(f"{whole!r}: a selector is model:NAME, route:NAME, mode:live or mode:test")
        if kind in chosen:
            raise InvalidPlanError(f"{whole!r}: {kind} appears twice")
        chosen[kind] = value
    return chosen


def _rate(measure: str, text: str) -> tuple[float, str, int | None]:
    match = _RATE.fullmatch(text)
    if match is None or match[2] is None:
        raise _no_rate(measure, text)
    return float(match[1]), _INTERVALS[match[2]], None if match[3] is None else int(match[3])


def _no_rate(name: str, text: str) -> InvalidPlanError:
    if _TOO_LARGE_RATE.match(text.strip()):
        return InvalidPlanError(f"{text!r} is too large a rate: at most 1000000/s")
    return InvalidPlanError(f"{name}: {text!r} is no rate: write it as 50/s, 3000/min, 100/h or 1000/d")


def _whole(name: str, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise InvalidPlanError(f"{name}: {text!r} is neither a whole number, such as 1000, nor {NONE}")
    # Check the length before parsing: int() refuses thousands of digits.
    if len(text.lstrip("0")) > len(str(LIMIT_MAX)):
        raise InvalidPlanError(f"{name}: the number is too large: at most {LIMIT_MAX}")
    return int(text)


def _money(name: str, text: str) -> int:
    match = _MONEY.fullmatch(text)
    if match is None:
        raise InvalidPlanError(
            f"{name}: {text!r} is neither an amount with up to six places, such as 50.00, nor {NONE}"
        )
    return _whole(name, match[1] + (match[2] or "").ljust(_MICRO_PLACES, "0"))
