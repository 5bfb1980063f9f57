"""The tables `[tokens]` and `[money]`, and the keys of a route that concern tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from keyproxy.ai.dialects.table import DIALECTS
from keyproxy.ai.model_source import parse_model_source
from keyproxy.ai.requests.request_reading import BodyBounds
from keyproxy.ai.reservation import BYTES, ESTIMATE, INSERT, OFF, REFUSE, TokenRules
from keyproxy.ai.scanning.json_bounds import JsonBounds

#: Values of `[[routes]].tokens`.
TOKEN_DIALECTS: Final = ("none", *DIALECTS)

#: Values of `[[routes]].cap`; empty: the default, which is to insert.
CAPS: Final = ("", INSERT, REFUSE, OFF)

IDEMPOTENCY: Final = ("once", "off")

#: Routes of these dialects have no maximum to insert.
_UNCAPPED: Final = ("none", "header")

#: Bodies of one user may take a quarter of the memory, and each takes up to one body.
_USER_SHARE: Final = 4

_ROUTE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}")
_UNIT: Final = re.compile(r"[A-Za-z][A-Za-z0-9 _-]{0,15}")


def _setting(default: Any, check: Callable[[Any], str | None]) -> Any:
    return field(default=default, metadata={"check": check, "secret": False})


def _count(low: int, high: int = 10**12) -> Callable[[Any], str | None]:
    return lambda value: None if low <= value <= high else f"must be at least {low} and at most {high}"


def _bound(value: str) -> str | None:
    return None if value in (ESTIMATE, BYTES) else f"must be {ESTIMATE!r} or {BYTES!r}"


def _seconds(value: float) -> str | None:
    return None if 0.0 <= value <= 60.0 else "must be at least 0 and at most 60"


def _unit(value: str) -> str | None:
    return None if _UNIT.fullmatch(value) else "must be a short label such as 'USD'"


@dataclass(frozen=True, slots=True)
class Tokens:
    """How AI requests are read, and what they reserve."""

    input_bound: str = _setting(ESTIMATE, _bound)
    output_default: int = _setting(4_096, _count(1))
    output_min: int = _setting(16, _count(1))
    unknown_input_max: int = _setting(131_072, _count(1))
    usage_wait_seconds: float = _setting(5.0, _seconds)
    body_bytes_max: int = _setting(8_388_608, _count(1_024, 1 << 30))
    body_memory_max: int = _setting(268_435_456, _count(4_096, 1 << 40))
    body_rate_min: int = _setting(4_096, _count(0))
    inflate_ratio_max: int = _setting(64, _count(1, 10_000))
    json_values_max: int = _setting(400_000, _count(1, 10**7))
    json_containers_max: int = _setting(32_768, _count(1, 10**6))
    json_depth_max: int = _setting(64, _count(1, 1_024))

    def rules(self) -> TokenRules:
        """The settings that determine reservations."""
        return TokenRules(
            input_bound=self.input_bound,
            output_default=self.output_default,
            output_min=self.output_min,
            unknown_input_max=self.unknown_input_max,
        )

    def bounds(self) -> BodyBounds:
        """The settings that bound a body."""
        json = JsonBounds(self.json_values_max, self.json_containers_max, self.json_depth_max)
        return BodyBounds(self.body_bytes_max, self.inflate_ratio_max, json)


@dataclass(frozen=True, slots=True)
class Money:
    """The currency, which is only a label."""

    unit: str = _setting("USD", _unit)


def conflicts(tokens: Tokens, routes: Sequence[tuple[str, str, str, str, str]]) -> list[str]:
    """The contradictions within `[tokens]` and within a route.

    `routes`: the match, tokens, model, cap and cap field of each.
    """
    wrong = []
    for number, (match, dialect, model, cap, cap_field) in enumerate(routes, start=1):
        faults = _route_conflicts(match, dialect, model=model, cap=cap, cap_field=cap_field)
        wrong += [f"routes[{number}].{fault}" for fault in faults]
    if tokens.output_min > tokens.output_default:
        wrong.append("tokens.output_min: must not be more than tokens.output_default")
    if tokens.body_memory_max < _USER_SHARE * tokens.body_bytes_max:
        wrong.append(
            f"tokens.body_memory_max: must be at least {_USER_SHARE} times tokens.body_bytes_max,"
            " because one user may take a quarter of it"
        )
    return wrong


def route_name_fault(value: str) -> str | None:
    """What is wrong with a route's name."""
    if value == "" or _ROUTE_NAME.fullmatch(value):
        return None
    return "must be 1 to 64 of A-Z, a-z, 0-9 and ._:/- and begin with a letter or digit"


def model_fault(value: str) -> str | None:
    """What is wrong with a route's model source."""
    try:
        parse_model_source(value)
    except ValueError as error:
        return str(error)
    return None


def cap_field_fault(value: str) -> str | None:
    """What is wrong with a route's cap field, whatever its dialect."""
    known = {path[-1] for dialect in DIALECTS.values() for path in dialect.usual.maximums}
    return None if value == "" or value in known else f"must be one of {', '.join(sorted(known))}"


def _route_conflicts(match: str, tokens: str, *, model: str, cap: str, cap_field: str) -> list[str]:
    wrong = []
    if tokens in _UNCAPPED:
        wrong += [
            f"{key}: has no effect with tokens = {tokens!r}, which has no output maximum"
            for key, value in (("cap", cap), ("cap_field", cap_field))
            if value
        ]
    elif cap_field and cap_field not in {path[-1] for path in DIALECTS[tokens].usual.maximums}:
        wrong.append(f"cap_field: {cap_field!r} is no output maximum of tokens = {tokens!r}")
    source = parse_model_source(model)
    if source.kind == "path" and f"{{{source.name}}}" not in match and f"{{{source.name}...}}" not in match:
        wrong.append(f"model: {model!r} needs the placeholder {{{source.name}}} in match")
    return wrong
