"""The members that count of a document in its shortest form, which most clients send: read by a parser, not by a scan.

A document that equals what is written for the parsed one has no name twice, at any depth, because the parser keeps one
of them. This takes a sixth of the time of the scan without compiled modules.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from keyproxy.ai.scanning.member_scope import MemberScope
from keyproxy.ai.scanning.member_values import MemberValues
from keyproxy.mypyc_compat import mypyc_attr


@mypyc_attr(acyclic=True)
class CompactValues(MemberValues):
    """As after a scan, without `spans`."""

    __slots__ = ("_found",)

    def __init__(self, content: bytes, document: Any, scope: MemberScope) -> None:
        """Raises AmbiguousNameError."""
        super().__init__(content)
        self._found: Final[dict[str, Any]] = {}
        self.is_object = isinstance(document, dict)
        if self.is_object:
            self._take(document, scope)

    def text(self, path: str) -> str | None:
        value = self._found.get(path)
        return value if isinstance(value, str) else None

    def raw(self, path: str) -> bytes:
        return orjson.dumps(self._found[path])

    def _take(self, members: dict[str, Any], scope: MemberScope) -> None:
        for name, value in members.items():
            slot = scope.name(name.encode("utf-8")).slot
            if slot is None:
                continue
            self._found[slot.path] = value
            if isinstance(value, str):
                self.values[slot.path] = value
            elif isinstance(value, dict):
                self.values[slot.path] = {}
                if slot.scope is not None:
                    self._take(value, slot.scope)
            else:
                self.values[slot.path] = [] if isinstance(value, list) else orjson.dumps(value)


def compact_values(content: bytes, scope: MemberScope, depth_max: int) -> CompactValues | None:
    """The members of a document; None if it has another form, or could be too deep. Raises AmbiguousNameError."""
    # No document is deeper than it has brackets.
    if content.count(b"{") + content.count(b"[") > depth_max:
        return None
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        return None
    if orjson.dumps(document) != content:
        return None
    return CompactValues(content, document, scope)
