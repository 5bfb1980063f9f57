"""What `access` and `encoded_slash` of the routes contradict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final

from keyproxy.http.path_patterns import parse_pattern

KEY: Final = "key"
PUBLIC: Final = "public"
REFUSE: Final = "refuse"
FORWARD: Final = "forward"

#: Keys of a route that depend on an identity, or restrict what it may do.
_NOT_PUBLIC: Final = ("scopes", "tokens", "encoded_slash", "model", "prompt", "category", "unregistered", "binds")


def contradictions(rows: Sequence[Any]) -> Iterator[str]:
    """Return a sentence for each fault of the `RouteRow`s."""
    patterns = [parse_pattern(row.match) for row in rows]
    for number, (row, pattern) in enumerate(zip(rows, patterns, strict=True), start=1):
        if row.encoded_slash == FORWARD and not pattern.has_placeholder:
            yield f"routes[{number}].encoded_slash: 'forward' needs a placeholder in match"
        if row.access != PUBLIC:
            continue
        for key in dataclasses.fields(row):
            if key.name in _NOT_PUBLIC and getattr(row, key.name) != default_of(key):
                yield f"routes[{number}].{key.name}: must not be set with access = 'public', which checks no key"
        for later_number, later in enumerate(rows[number:], start=number + 1):
            if later.access == KEY and pattern.covers(patterns[later_number - 1]):
                yield (
                    f"routes[{number}].access: 'public' would also apply to routes[{later_number}] {later.match!r}, which"
                    f" needs a key: {row.match!r} precedes it and matches the same requests; move it below"
                )


def default_of(key: dataclasses.Field[Any]) -> Any:
    """The default value of a key."""
    return key.default_factory() if callable(key.default_factory) else key.default
