"""Patterns of routes: `METHOD /path` or `* /path`.

A segment of the path is plain text, or a placeholder: `{name}` matches a segment that is not empty, `{name}:verb` one
that continues after the value with this text, `{rest...}` at the end the remainder of the path, which may be empty.
Only the text at the end of a segment is compared, so the longest value wins: `{model}:run` matches `a:run:run` with the
value `a:run`.
"""

from __future__ import annotations

import enum
import re
from typing import Final, NamedTuple

#: Methods that are refused before routes are matched.
_NEVER_SERVED: Final = ("CONNECT", "TRACE")

_METHOD = re.compile(r"\*|[A-Z][A-Z-]{0,19}")
#: No `%` or `;`, and no dot segment or empty one: a path with these is refused before it is matched, or matches two
#: routes, so such a pattern could never match.
_TEXT: Final = r"[A-Za-z0-9\-._~!$&'()*+,=:@]"
_LITERAL = re.compile(rf"(?!\.\.?\Z){_TEXT}+")
_PLACEHOLDER = re.compile(rf"\{{([a-z][a-z0-9_]*)(\.\.\.)?\}}({_TEXT}*)")


class InvalidPatternError(ValueError):
    """A route pattern that cannot be compiled. The text names the fault."""


class Rest(enum.Enum):
    """What follows the constant start of the paths that a pattern matches. For most patterns no expression is needed."""

    NOTHING = "nothing"
    #: One segment that is not empty.
    ONE_VALUE = "one value"
    ANYTHING = "anything"
    #: Only the expression matches these.
    EXPRESSION = "expression"


class Segment(NamedTuple):
    """One segment of a pattern. `name`: of the placeholder; empty for plain text. `text`: the plain text, or what
    follows the placeholder."""

    name: str
    text: str
    is_rest: bool = False

    def covers(self, other: Segment) -> bool:
        """Whether this segment matches everything that the other one matches."""
        if self.is_rest:
            return True
        if other.is_rest:
            return False
        if not self.name:
            return not other.name and self.text == other.text
        # A value has at least one character, and a placeholder's can be any: only the text after it is certain.
        return other.text.endswith(self.text) and (bool(other.name) or len(other.text) > len(self.text))

    def expression(self, *, captured: str | None = None) -> str:
        """The segment as a regular expression. `captured`: the placeholder whose value is a group; None: all are."""
        if not self.name:
            return re.escape(self.text)
        value = ".*" if self.is_rest else "[^/]+"
        is_captured = captured is None or self.name == captured
        return (f"({value})" if is_captured else value) + re.escape(self.text)


class PathPattern(NamedTuple):
    """A parsed pattern. `method` None: any."""

    method: bytes | None
    segments: tuple[Segment, ...]

    @property
    def has_placeholder(self) -> bool:
        """Whether any segment has a placeholder."""
        return any(segment.name for segment in self.segments)

    @property
    def has_rest(self) -> bool:
        """Whether the last segment matches any number of segments."""
        return self.segments[-1].is_rest

    @property
    def start(self) -> bytes:
        """What every matching path begins with."""
        start = ""
        for segment in self.segments:
            start += "/"
            if segment.name:
                break
            start += segment.text
        return start.encode("ascii")

    @property
    def rest(self) -> Rest:
        """What of a matching path follows `start`."""
        if not self.has_placeholder:
            return Rest.NOTHING
        first = next(place for place, segment in enumerate(self.segments) if segment.name)
        segment = self.segments[first]
        if segment.is_rest:
            return Rest.ANYTHING
        is_last = first == len(self.segments) - 1
        return Rest.ONE_VALUE if is_last and not segment.text else Rest.EXPRESSION

    def compiled(self, *, captured: str | None = "") -> re.Pattern[bytes]:
        """An expression that matches whole paths. `captured`: see `Segment.expression`; empty: no group."""
        path = "".join(f"/{segment.expression(captured=captured)}" for segment in self.segments)
        return re.compile(path.encode())

    def covers(self, other: PathPattern) -> bool:
        """Whether this pattern matches every request that the other one matches."""
        if self.method not in (None, other.method):
            return False
        for place, segment in enumerate(self.segments):
            if place >= len(other.segments):
                return False
            if not segment.covers(other.segments[place]):
                return False
            if segment.is_rest:
                return True
        return len(self.segments) == len(other.segments)


def parse_pattern(text: str) -> PathPattern:
    """Parse a pattern. Raises InvalidPatternError."""
    method, space, path = text.partition(" ")
    if not space or not path.startswith("/") or " " in path:
        raise InvalidPatternError(f"{text!r} is not 'METHOD /path'")
    if not _METHOD.fullmatch(method):
        raise InvalidPatternError(f"{method!r} in {text!r} is not a method: use upper case, or * for any")
    if method in _NEVER_SERVED:
        raise InvalidPatternError(f"{text!r} can never match: {method} is refused")
    parts = path[1:].split("/")
    segments = [_segment(part, text, is_last=place == len(parts) - 1) for place, part in enumerate(parts)]
    names = [segment.name for segment in segments if segment.name]
    if len(set(names)) < len(names):
        raise InvalidPatternError(f"{text!r} has two placeholders of one name")
    return PathPattern(None if method == "*" else method.encode(), tuple(segments))


def _segment(part: str, text: str, *, is_last: bool) -> Segment:
    placeholder = _PLACEHOLDER.fullmatch(part)
    if placeholder is None:
        if not _LITERAL.fullmatch(part) and not (is_last and not part):
            raise InvalidPatternError(
                f"segment {part!r} of {text!r} is neither plain text nor one {{name}}, with or without text after it"
            )
        return Segment("", part)
    name, dots, after = placeholder.groups()
    if not dots:
        return Segment(name, after)
    if not is_last or after:
        raise InvalidPatternError(f"{{{name}...}} in {text!r} must be the last segment, without text after it")
    return Segment(name, "", is_rest=True)


def placeholder_pattern(text: str, name: str) -> re.Pattern[bytes]:
    """A pattern of the same paths, with the value at the placeholder `name` in its first group.

    Raises InvalidPatternError.
    """
    return parse_pattern(text).compiled(captured=name)
