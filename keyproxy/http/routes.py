"""The route table: compiled once, matched per request. First match wins; what matches none is not allowed.

A pattern is `METHOD /path` or `* /path`; `{name}` stands for one segment, `{rest...}` at the end for the remainder.
No routes at all means: any path, for any valid key.

What is matched must be what the upstream will understand. A path may still be spelt in ways that some servers fold
(`%61` for `a`, `//` for `/`, `;matrix=parameters` cut off), so such a path is matched both as sent and folded, and if
the two readings meet different routes it is refused: a broad route below must not open what a narrow one above guards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

from keyproxy.model import Route
from keyproxy.reasons import Reason, Refusal

#: Methods that are served without being named by a route: those registered for HTTP (RFC 9110 section 16.1.1), and some
#: that are in wide use. Not CONNECT, which is for a forward proxy, and not TRACE, which repeats credentials.
KNOWN_METHODS: Final = frozenset(
    b"""
    GET HEAD POST PUT PATCH DELETE OPTIONS QUERY
    ACL BASELINE-CONTROL BIND CHECKIN CHECKOUT COPY LABEL LINK LOCK MERGE MKACTIVITY MKCALENDAR MKCOL MKREDIRECTREF
    MKWORKSPACE MOVE ORDERPATCH PROPFIND PROPPATCH REBIND REPORT SEARCH UNBIND UNCHECKOUT UNLINK UNLOCK UPDATE
    UPDATEREDIRECTREF VERSION-CONTROL
    M-SEARCH NOTIFY PURGE SOURCE SUBSCRIBE UNSUBSCRIBE
    """.split()
)

#: Methods that are refused before any route is looked at.
_NEVER_SERVED: Final = ("CONNECT", "TRACE")

ANY_ROUTE: Final = Route(name="any")

_METHOD = re.compile(r"\*|[A-Z][A-Z-]{0,19}")
_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)(\.\.\.)?\}")
#: Without `%` and `;`, and never a dot segment or an empty one: what a lenient server reads otherwise is refused before
#: it is matched, or meets two routes, so that such a pattern could match nothing.
_LITERAL = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9\-._~!$&'()*+,=:@]+")
_PARAMETERS = re.compile(rb";[^/]*")
_SLASHES = re.compile(rb"/{2,}")
_FOLDED_BY_SOME: Final = (b"%", b"//", b";")

#: Paths that were matched are remembered up to here; then all are forgotten. Paths hold ids, so most never come back.
_REMEMBERED_MAX: Final = 4096
_REMEMBERED_BYTES_MAX: Final = 256


class InvalidPatternError(ValueError):
    """A route pattern that cannot be compiled; the text says what is wrong with it."""


class RouteTable:
    """Compiled routes. `match` never waits and keeps no state that a decision depends on."""

    def __init__(self, routes: Sequence[tuple[str, Route]]) -> None:
        """`routes`: patterns with what they lead to, in order. Raises InvalidPatternError."""
        self._compiled = [(*_compile(pattern), route) for pattern, route in routes]
        self._remembered: dict[tuple[bytes, bytes], Route | None] = {}

    def match(self, method: bytes, path: bytes) -> Route | None:
        """The first route for this method and raw path, None if there is none.

        Raises a Refusal (REQUEST_MALFORMED) for a path whose two readings meet different routes.
        """
        if not self._compiled:
            return ANY_ROUTE
        try:
            return self._remembered[method, path]
        except KeyError:
            pass
        route = self._first(method, path)
        is_folded = any(mark in path for mark in _FOLDED_BY_SOME)
        if is_folded and any(self._first(method, reading) is not route for reading in readings(path)):
            raise Refusal(Reason.REQUEST_MALFORMED, "the path, as some servers fold it, is another route's")
        if len(self._remembered) >= _REMEMBERED_MAX:
            self._remembered.clear()
        if len(path) <= _REMEMBERED_BYTES_MAX:
            self._remembered[method, path] = route
        return route

    def names(self) -> Iterable[str]:
        """Every value that the metric label `route` can take."""
        return [*(route.name for *_, route in self._compiled), ANY_ROUTE.name]

    def methods(self) -> frozenset[bytes]:
        """Every method that is served: the known ones, and those that a pattern names."""
        return KNOWN_METHODS | {method for method, *_ in self._compiled if method is not None}

    def _first(self, method: bytes, path: bytes) -> Route | None:
        for wanted, pattern, route in self._compiled:
            if (wanted is None or wanted == method) and pattern.fullmatch(path):
                return route
        return None


def readings(path: bytes) -> set[bytes]:
    """The path as lenient servers may read it: percent-decoded or not, repeated slashes joined or not, with
    `;parameters` cut or not, in every combination.
    """
    found = {path, _PARAMETERS.sub(b"", path)}
    found |= {unquote_to_bytes(one) for one in found}
    found |= {_PARAMETERS.sub(b"", one) for one in found}
    return found | {_SLASHES.sub(b"/", one) for one in found}


def _compile(text: str) -> tuple[bytes | None, re.Pattern[bytes]]:
    method, space, path = text.partition(" ")
    if not space or not path.startswith("/") or " " in path:
        raise InvalidPatternError(f"{text!r} is not 'METHOD /path'")
    if not _METHOD.fullmatch(method):
        raise InvalidPatternError(f"{method!r} in {text!r} is no method: use upper case, or * for any")
    if method in _NEVER_SERVED:
        raise InvalidPatternError(f"{text!r} can never match: {method} is refused")
    segments = path[1:].split("/")
    pattern = "".join(
        _segment(segment, text=text, is_last=place == len(segments) - 1) for place, segment in enumerate(segments)
    )
    return (None if method == "*" else method.encode()), re.compile(pattern.encode())


def _segment(segment: str, *, text: str, is_last: bool) -> str:
    placeholder = _PLACEHOLDER.fullmatch(segment)
    if placeholder is None:
        if not _LITERAL.fullmatch(segment) and not (is_last and not segment):
            raise InvalidPatternError(f"segment {segment!r} of {text!r} is neither plain text nor one {{name}}")
        return "/" + re.escape(segment)
    if not placeholder[2]:
        return "/[^/]+"
    if not is_last:
        raise InvalidPatternError(f"{segment!r} in {text!r} must be the last segment")
    return "/.*"
