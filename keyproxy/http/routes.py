"""The route table: compiled once, matched per request. The first match wins; a request without a match is refused.

A pattern is `METHOD /path` or `* /path`; `{name}` matches one segment, `{rest...}` at the end the remainder. Without
any routes, every path is allowed for any valid key.

The proxy must match the path that the upstream will see. Some servers normalise a path (`%61` for `a`, `//` for `/`,
`;matrix=parameters` removed), so such a path is matched both as sent and normalised, and refused if the two match
different routes: a broad route further down must not expose what a narrow one above it protects.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

from keyproxy.model import Route
from keyproxy.reasons import Reason, Refusal

#: Methods that are served even if no route names them: those registered for HTTP (RFC 9110 section 16.1.1), and some in
#: wide use. Not CONNECT, which is for forward proxies, and not TRACE, which echoes credentials.
KNOWN_METHODS: Final = frozenset(
    b"""
    GET HEAD POST PUT PATCH DELETE OPTIONS QUERY
    ACL BASELINE-CONTROL BIND CHECKIN CHECKOUT COPY LABEL LINK LOCK MERGE MKACTIVITY MKCALENDAR MKCOL MKREDIRECTREF
    MKWORKSPACE MOVE ORDERPATCH PROPFIND PROPPATCH REBIND REPORT SEARCH UNBIND UNCHECKOUT UNLINK UNLOCK UPDATE
    UPDATEREDIRECTREF VERSION-CONTROL
    M-SEARCH NOTIFY PURGE SOURCE SUBSCRIBE UNSUBSCRIBE
    """.split()
)

#: Methods that are refused before routes are matched.
_NEVER_SERVED: Final = ("CONNECT", "TRACE")

ANY_ROUTE: Final = Route(name="any")

_METHOD = re.compile(r"\*|[A-Z][A-Z-]{0,19}")
_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)(\.\.\.)?\}")
#: No `%` or `;`, and no dot segment or empty one: a path with these is refused before it is matched, or matches two
#: routes, so such a pattern could never match.
_LITERAL = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9\-._~!$&'()*+,=:@]+")
_PARAMETERS = re.compile(rb";[^/]*")
_SLASHES = re.compile(rb"/{2,}")
_FOLDED_BY_SOME: Final = (b"%", b"//", b";")

#: The number of matched paths that are cached; then the cache is cleared. Paths contain ids, so most never recur.
_REMEMBERED_MAX: Final = 4096
_REMEMBERED_BYTES_MAX: Final = 256


class InvalidPatternError(ValueError):
    """A route pattern that cannot be compiled. The text names the fault."""


class RouteTable:
    """Compiled routes. `match` never waits and keeps no state that a decision depends on."""

    def __init__(self, routes: Sequence[tuple[str, Route]]) -> None:
        """`routes`: patterns with their routes, in order. Raises InvalidPatternError."""
        self._compiled = [(*_compile(pattern), route) for pattern, route in routes]
        self._remembered: dict[tuple[bytes, bytes], Route | None] = {}

    def match(self, method: bytes, path: bytes) -> Route | None:
        """The first route for this method and raw path, None if there is none.

        Raises a Refusal (REQUEST_MALFORMED) for a path that matches different routes as sent and normalised.
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
            raise Refusal(Reason.REQUEST_MALFORMED, "the path matches another route once it is normalised")
        if len(self._remembered) >= _REMEMBERED_MAX:
            self._remembered.clear()
        if len(path) <= _REMEMBERED_BYTES_MAX:
            self._remembered[method, path] = route
        return route

    def error_shape(self, method: bytes, path: bytes) -> str:
        """The error format of the route for this method and raw path; the default if none matches unambiguously."""
        try:
            route = self.match(method, path)
        except Refusal:
            return ANY_ROUTE.error_shape
        return ANY_ROUTE.error_shape if route is None else route.error_shape

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
    """The path as lenient servers may read it: percent-decoded or not, repeated slashes merged or not, `;parameters`
    removed or not, in every combination.
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
        raise InvalidPatternError(f"{method!r} in {text!r} is not a method: use upper case, or * for any")
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
