"""What `serves` of the routes contradicts: a request that the proxy responds to itself goes to no upstream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final

from keyproxy.auth.minting import MINT_SCOPE
from keyproxy.config.route_access import default_of
from keyproxy.http.path_patterns import parse_pattern

_METHOD: Final = b"POST"

#: Keys of a route that concern what is sent upstream, or a body of another kind.
_NOT_SERVED: Final = (
    "tokens", "model", "cap", "cap_field", "idempotency", "binds", "prompt", "category", "unregistered", "access",
    "encoded_slash",
)  # fmt: skip


def contradictions(rows: Sequence[Any]) -> Iterator[str]:
    """Return a sentence for each fault of the `RouteRow`s."""
    for number, row in enumerate(rows, start=1):
        if not row.serves:
            continue
        pattern = parse_pattern(row.match)
        if pattern.method != _METHOD:
            yield f"routes[{number}].serves: {row.serves!r} needs the method POST in match, not {row.match!r}"
        if pattern.has_placeholder:
            yield f"routes[{number}].serves: {row.serves!r} needs a match without placeholders, not {row.match!r}"
        if MINT_SCOPE not in row.scopes:
            yield f"routes[{number}].serves: {row.serves!r} needs {MINT_SCOPE!r} in scopes"
        for key in dataclasses.fields(row):
            if key.name in _NOT_SERVED and getattr(row, key.name) != default_of(key):
                yield f"routes[{number}].{key.name}: must not be set with serves = {row.serves!r}: nothing goes upstream"
