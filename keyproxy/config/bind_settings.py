"""The key `binds` of a route: its faults, and the binds that it states."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from keyproxy.ai.access.namespaces import ALLOW, REFUSE, RULES, Bind, rule_fault
from keyproxy.ai.access.value_sources import HEADER, PATH, parse_value_source
from keyproxy.http.headers import FieldNames, Kind

BINDS_MAX: Final = 16

_KEYS: Final = ("value", *RULES, "missing")

#: Headers of other kinds are not forwarded as they were sent.
_FORWARDED: Final = (Kind.PLAIN, Kind.CONTENT_TYPE, Kind.USAGE)


def binds_fault(rows: Sequence[Mapping[str, str]]) -> str | None:
    """What is wrong with the binds of a route, apart from its other keys."""
    if len(rows) > BINDS_MAX:
        return f"has {len(rows)} binds; at most {BINDS_MAX} are allowed"
    for number, row in enumerate(rows, start=1):
        fault = _bind_fault(row)
        if fault is not None:
            return f"bind {number}: {fault}"
    return None


def read_binds(rows: Sequence[Mapping[str, str]]) -> tuple[Bind, ...]:
    """The binds of a route without faults."""
    found = []
    for row in rows:
        rule = next(name for name in RULES if name in row)
        source = parse_value_source(row["value"])
        found.append(Bind(source, rule, row[rule], accepts_missing=row.get("missing", REFUSE) == ALLOW))
    return tuple(found)


def place_faults(match: str, binds: Sequence[Bind], header_prefix: str) -> list[str]:
    """The faults of binds that read a place where no value can be."""
    wrong = []
    for number, bind in enumerate(binds, start=1):
        source = bind.source
        if source.kind == PATH:
            count = len(re.findall(rf"\{{{re.escape(source.name)}(?:\.\.\.)?\}}", match))
            if count == 0:
                wrong.append(f"binds: bind {number}: {source.text!r} needs the placeholder {{{source.name}}} in match")
            elif count > 1:
                wrong.append(f"binds: bind {number}: the placeholder {{{source.name}}} occurs in match {count} times")
        elif source.kind == HEADER and not is_forwarded_header(source.name, header_prefix):
            wrong.append(f"binds: bind {number}: the header {source.name!r} is not forwarded as it was sent")
    return wrong


def header_faults(model: str, categories: Sequence[str], header_prefix: str) -> list[str]:
    """The faults of a route's other sources that name a header which does not go upstream as it was sent."""
    wrong = []
    for key, texts in (("model", [model]), ("category", categories)):
        for text in texts:
            kind, _, name = text.partition(":")
            if kind == HEADER and not is_forwarded_header(name, header_prefix):
                wrong.append(f"{key}: the header {name!r} is not forwarded as it was sent")
    return wrong


def is_forwarded_header(name: str, header_prefix: str) -> bool:
    """Whether a header of this name goes upstream as the client sent it."""
    return FieldNames(header_prefix).kind(name.encode("ascii")) in _FORWARDED


def _bind_fault(row: Mapping[str, str]) -> str | None:
    unknown = [key for key in row if key not in _KEYS]
    if unknown:
        return f"has no key {unknown[0]!r}; known: {', '.join(_KEYS)}"
    if "value" not in row:
        return "has no value"
    try:
        parse_value_source(row["value"])
    except ValueError as error:
        return f"value: {error}"
    rules = [name for name in RULES if name in row]
    if len(rules) != 1:
        return f"must have exactly one of {', '.join(RULES)}"
    fault = rule_fault(rules[0], row[rules[0]])
    if fault is not None:
        return f"{rules[0]}: {fault}"
    if row.get("missing", REFUSE) not in (REFUSE, ALLOW):
        return f"missing: must be {REFUSE!r} or {ALLOW!r}"
    return None
