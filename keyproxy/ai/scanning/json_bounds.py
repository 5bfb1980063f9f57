"""The largest JSON documents that are read, and the faults of a document."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.scanning.json_grammar import Utf8
from keyproxy.mypyc_compat import mypyc_attr

_PIECE_BYTES: Final = 65_536


class JsonError(Exception):
    """The document is not well-formed JSON in UTF-8; the text describes the fault."""


class TooDenseError(Exception):
    """The document exceeds a limit; the text is the name of the setting, `bound` its value."""

    def __init__(self, setting: str, bound: int) -> None:
        super().__init__(setting)
        self.bound = bound


@mypyc_attr(acyclic=True)
class JsonBounds:
    """The largest documents that are read."""

    __slots__ = ("containers_max", "depth_max", "values_max")

    def __init__(self, values_max: int = 400_000, containers_max: int = 32_768, depth_max: int = 64) -> None:
        self.values_max: Final = values_max
        self.containers_max: Final = containers_max
        self.depth_max: Final = depth_max


@mypyc_attr(acyclic=True)
class Density:
    """Counts the values and containers of one document against the bounds. Raises TooDenseError."""

    __slots__ = ("_bounds", "_containers", "_values")

    def __init__(self, bounds: JsonBounds) -> None:
        self._bounds: Final = bounds
        self._values = 0
        self._containers = 0

    def add_values(self, count: int) -> None:
        """Count strings, numbers and literals."""
        self._values += count
        if self._values > self._bounds.values_max:
            raise TooDenseError("json_values_max", self._bounds.values_max)

    def add_container(self, depth: int) -> None:
        """Count an array or object. `depth`: of how many it is the innermost."""
        self.add_values(1)
        self._containers += 1
        bounds = self._bounds
        if self._containers > bounds.containers_max:
            raise TooDenseError("json_containers_max", bounds.containers_max)
        if depth > bounds.depth_max:
            raise TooDenseError("json_depth_max", bounds.depth_max)


class EncodingCheck:
    """Checks that a document is UTF-8, in portions."""

    __slots__ = ("_at", "_content", "_utf8")

    def __init__(self, content: bytes) -> None:
        self._content: Final = content
        self._utf8: Final = Utf8()
        self._at = 0

    def advance(self) -> int:
        """Check the next portion; return its length, 0 at the end. Raises JsonError."""
        piece = self._content[self._at : self._at + _PIECE_BYTES]
        if not piece:
            if not self._utf8.is_whole:
                raise JsonError("a character is cut off")
            return 0
        if not self._utf8.takes(piece):
            raise JsonError("it is not UTF-8")
        self._at += len(piece)
        return len(piece)
