"""The rows of `[[categories]]`, and the keys of a route that concern categories of prompts."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from keyproxy.ai.categories import CATEGORY_NAME, FIXED, PATTERNS, TEMPLATE, Category, parse_category_source
from keyproxy.auth.names import is_scope

#: The keys of a row, in the order of the example.
CATEGORY_KEYS: Final = ("name", "scopes", "patterns")

CATEGORIES_MAX: Final = 64
PATTERNS_MAX: Final = 200
PATTERN_BYTES_MAX: Final = 1_024
_SCOPES_MAX: Final = 64


class CategoryKeys(NamedTuple):
    """The keys of one route that concern categories."""

    prompt: str
    category: Sequence[str]
    unregistered: str


def read_categories(rows: object) -> tuple[tuple[Category, ...], list[str]]:
    """Return the categories, and a sentence for each fault."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return (), ["categories: must be an array of tables, [[categories]]"]
    if len(rows) > CATEGORIES_MAX:
        return (), [f"categories: has {len(rows)} rows; at most {CATEGORIES_MAX} are allowed"]
    wrong: list[str] = []
    categories: list[Category] = []
    for number, row in enumerate(rows, start=1):
        faults = _faults(row)
        wrong += [f"categories[{number}].{fault}" for fault in faults]
        if not faults:
            patterns = tuple(row.get("patterns", []))
            categories.append(Category(row["name"], frozenset(row.get("scopes", [])), patterns))
    count = sum(len(category.patterns) for category in categories)
    if count > PATTERNS_MAX:
        wrong.append(f"categories: the rows have {count} patterns; at most {PATTERNS_MAX} are allowed")
    return tuple(categories), [*wrong, *_repeated(rows)]


def _faults(row: dict[str, Any]) -> list[str]:
    found = []
    for key in row:
        if key not in CATEGORY_KEYS:
            close = difflib.get_close_matches(key, CATEGORY_KEYS, n=1, cutoff=0.5)
            found.append(f"{key}: no such key" + (f"; did you mean {close[0]}?" if close else ""))
    name, scopes, patterns = row.get("name"), row.get("scopes", []), row.get("patterns", [])
    if not isinstance(name, str) or not CATEGORY_NAME.fullmatch(name):
        found.append("name: must be 1 to 64 of a-z, 0-9, _ and - and begin with a letter")
    if not isinstance(scopes, list) or len(scopes) > _SCOPES_MAX or not all(_is_scope(scope) for scope in scopes):
        found.append(f"scopes: must be a list of at most {_SCOPES_MAX} scopes")
    if not isinstance(patterns, list) or not all(isinstance(one, str) and one for one in patterns):
        found.append("patterns: must be a list of regular expressions")
    elif any(len(one.encode("utf-8")) > PATTERN_BYTES_MAX for one in patterns):
        found.append(f"patterns: a pattern may have at most {PATTERN_BYTES_MAX} bytes")
    return found


def _is_scope(value: object) -> bool:
    return isinstance(value, str) and is_scope(value)


def _repeated(rows: list[dict[str, Any]]) -> list[str]:
    first: dict[str, int] = {}
    found = []
    for number, row in enumerate(rows, start=1):
        name = row.get("name")
        if isinstance(name, str) and first.setdefault(name, number) != number:
            found.append(f"categories[{number}].name: {name!r} is already the name of categories[{first[name]}]")
    return found


def category_fault(value: list[str]) -> str | None:
    """What is wrong with the category sources of a route, whatever its other keys."""
    for text in value:
        try:
            parse_category_source(text)
        except ValueError as error:
            return str(error)
    return None


def unregistered_fault(value: str) -> str | None:
    """What is wrong with the category of unregistered prompts, whatever other keys."""
    return None if value == "" or CATEGORY_NAME.fullmatch(value) else f"{value!r} is not a valid name of a category"


def conflicts(categories: Sequence[Category], routes: Sequence[CategoryKeys]) -> list[str]:
    """The contradictions between the keys of a route, and between these and `[[categories]]`."""
    names = {category.name for category in categories}
    return [
        f"routes[{number}].{fault}"
        for number, keys in enumerate(routes, start=1)
        for fault in _route_conflicts(names, keys)
    ]


def _route_conflicts(names: set[str], keys: CategoryKeys) -> list[str]:
    sources = [parse_category_source(text) for text in keys.category]
    kinds = {source.kind for source in sources}
    wrong = [
        f"category: no row of [[categories]] has the name {source.name!r}"
        for source in sources
        if source.kind == FIXED and source.name not in names
    ]
    if keys.unregistered and keys.unregistered not in names:
        wrong.append(f"unregistered: no row of [[categories]] has the name {keys.unregistered!r}")
    if keys.unregistered and TEMPLATE not in kinds:
        wrong.append("unregistered: has no effect without the category source 'template'")
    if not keys.prompt and kinds & {TEMPLATE, PATTERNS}:
        wrong.append("prompt: is required by the category sources 'template' and 'patterns'")
    if kinds == {PATTERNS}:
        wrong.append(
            "category: 'patterns' only adds categories: name another source too, such as '=NAME' or 'template'"
        )
    return wrong


def category_warnings(categories: Sequence[Category], name: str) -> list[str]:
    """Warnings about a template of a category: requests with it are refused if the category is not configured."""
    if any(category.name == name for category in categories):
        return []
    return [f"no row of [[categories]] has the name {name!r}: prompts with this category are refused"]
