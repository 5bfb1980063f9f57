"""The values that a request is judged by: read once, from the bytes that are forwarded, and kept until it has ended."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from keyproxy.ai.access.model_judgement import NamedModels
from keyproxy.ai.categories import Categories, PatternSearch
from keyproxy.ai.dialects.endpoint import EACH, MemberPath
from keyproxy.ai.prompts import Instructions
from keyproxy.ai.requests.request_facts import malformed
from keyproxy.mypyc_compat import mypyc_attr

#: More elements under one pointer are refused.
_ELEMENTS_MAX: Final = 1_000


class Found(NamedTuple):
    """The values at a source. `is_missing`: nothing, or an element lacks it. `is_other`: a value that is no string."""

    values: tuple[str, ...] = ()
    is_missing: bool = False
    is_other: bool = False


MISSING: Final = Found(is_missing=True)


@mypyc_attr(acyclic=True)
class JudgedValues:
    """`models`: None if the route judges none. `found`: the values at the sources of binds, by their text. `declared`:
    see `CategoryValues`. `instructions`, `search`: None if no category depends on them. `categories`: those that were
    found last, also if the caller may not use them. No text of the request is kept once it is judged."""

    __slots__ = ("categories", "declared", "found", "instructions", "models", "search")

    def __init__(self, found: dict[str, Found]) -> None:
        self.found: Final = found
        self.models: NamedModels | None = None
        self.declared: tuple[object, ...] = ()
        self.instructions: Instructions | None = None
        self.search: PatternSearch | None = None
        self.categories: Categories | None = None

    def at(self, source: str) -> Found:
        """The values at a source, by its text."""
        return self.found.get(source, MISSING)


def found_text(value: str | None) -> Found:
    """The value at a source that has at most one."""
    return MISSING if value is None else Found((value,))


def found_at(document: Any, pointer: MemberPath) -> Found:
    """The values at a pointer of a JSON document. Raises a Refusal (REQUEST_MALFORMED) for too many elements.

    An empty array has no element that could be judged, so the value is missing. A value of another type than the pointer
    expects is there, but is no string: `null` or an object in place of an array may mean anything to an upstream.
    """
    values: list[Any] = [document]
    is_missing = is_other = False
    for name in pointer:
        inner: list[Any] = []
        for value in values:
            if name == EACH and isinstance(value, list):
                is_missing = is_missing or not value
                inner += value
            elif name != EACH and isinstance(value, dict):
                if name in value:
                    inner.append(value[name])
                else:
                    is_missing = True
            else:
                is_other = True
        if len(inner) > _ELEMENTS_MAX:
            raise malformed(f"'/{'/'.join(pointer)}' has more than {_ELEMENTS_MAX} elements.", pointer[0])
        values = inner
    texts = tuple([value for value in values if isinstance(value, str)])
    return Found(texts, is_missing=is_missing, is_other=is_other or len(texts) < len(values))
