"""The route table: compiled once, matched per request. The first match wins; a request without a match is refused.

`path_patterns` has the patterns. Without any routes, every path is allowed for any valid key.

The proxy must match the path that the upstream will see. Some servers normalise a path (`%61` for `a`, `//` for `/`,
`;matrix=parameters` removed), so such a path is matched both as sent and normalised, and refused if the two match
different routes: a broad route further down must not expose what a narrow one above it protects.

Frameworks also match paths without regard to case, with a slash or a format (`.json`) at the end, and HEAD like GET; an
MCP server that is mounted at a path gets everything below it. Where a route judges calls of tools, such a path is refused
too if it does not match the same route as sent: a tool must not be called by another spelling. A row above the route
that names such a path exempts it.

A path with `%2F` is refused before it is matched, unless a route forwards it. Then servers that keep it must read a path
of that route, and those that take it for a slash a path of that route or of none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from keyproxy.http import path_readings
from keyproxy.http.path_patterns import PathPattern, Rest, parse_pattern
from keyproxy.http_messages import RequestLine
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

ANY_ROUTE: Final = Route(name="any")

_SLASH: Final = 0x2F
_LF: Final = 0x0A


class _Row:
    """A compiled route. `values`: matches like the pattern, with a group for each placeholder.

    `lenient`: what servers that read leniently match, see `_lenient`. `has_rest`: only such a pattern matches a path with
    an empty segment before the end.
    """

    __slots__ = (
        "_ends_in_anything",
        "_ends_in_value",
        "_fullmatch",
        "_is_exact",
        "_start",
        "has_rest",
        "lenient",
        "method",
        "route",
        "values",
    )

    def __init__(self, pattern: PathPattern, route: Route) -> None:
        """Raises InvalidPatternError."""
        #: None: any.
        self.method: Final = pattern.method
        self.route: Final = route
        self.has_rest: Final = pattern.has_rest
        self.values: Final = pattern.compiled(captured=None)
        self.lenient: Final = re.compile(_lenient(pattern, route), re.IGNORECASE | re.DOTALL)
        self._start: Final = pattern.start
        rest = pattern.rest
        self._is_exact: Final = rest is Rest.NOTHING
        self._ends_in_value: Final = rest is Rest.ONE_VALUE
        self._ends_in_anything: Final = rest is Rest.ANYTHING
        self._fullmatch: Callable[[bytes], re.Match[bytes] | None] = pattern.compiled().fullmatch

    def matches(self, method: bytes, path: bytes) -> bool:
        """Whether a request with this path, taken literally, is one of this row."""
        if self.method is not None and self.method != method:
            return False
        # Most rows of a long table differ in their start, and most need no expression, which takes five times as long.
        start = self._start
        if self._is_exact:
            return path == start
        if not path.startswith(start):
            return False
        if self._ends_in_value:
            return len(path) > len(start) and _SLASH not in path[len(start) :]
        if self._ends_in_anything:
            return _LF not in path
        return self._fullmatch(path) is not None

    def may_match(self, method: bytes, path: bytes) -> bool:
        """Whether a server that reads leniently could take a request for one of this row."""
        if self.method is not None and self.method != method and not (method == b"HEAD" and self.method == b"GET"):
            return False
        return self.lenient.fullmatch(path) is not None


class RouteTable:
    """Compiled routes. `match` never waits and keeps no state that a decision depends on."""

    def __init__(self, routes: Sequence[tuple[str, Route]]) -> None:
        """`routes`: patterns with their routes, in order. Raises InvalidPatternError."""
        #: The patterns with their routes.
        self.rows: Final = tuple(routes)
        self.has_public: Final = any(route.is_public for _, route in routes)
        self.forwards_encoded_slash: Final = any(route.forwards_encoded_slash for _, route in routes)
        self._compiled = [_Row(parse_pattern(pattern), route) for pattern, route in routes]
        self._calling = [row for row in self._compiled if _calls_tools(row.route)]
        shapes = {ANY_ROUTE.error_shape, *(route.error_shape for _, route in routes)}
        #: The error format of all requests, if there is only one.
        self._only_shape = ANY_ROUTE.error_shape if len(shapes) == 1 else ""

    def match(self, method: bytes, path: bytes) -> Route | None:
        """The first route for this method and raw path, None if there is none.

        Raises a Refusal (REQUEST_MALFORMED) for a path that servers could read as one of another route.
        """
        return self._match(method, path, is_plain=False)

    def route_of(self, line: RequestLine) -> Route | None:
        """The first route for a request line, None if there is none. Raises a Refusal as `match` does."""
        if line.matched_by is not self:
            line.route = self._match(line.method, line.path, is_plain=line.is_plain)
            line.matched_by = self
        return line.route

    def public(self, line: RequestLine) -> Route | None:
        """The public route for a request line; None if a key is needed, or the path is ambiguous."""
        try:
            route = self.route_of(line)
        except Refusal:
            return None
        return route if route is not None and route.is_public else None

    def error_shape(self, line: RequestLine) -> str:
        """The error format of the route for a request line; the default if none matches unambiguously."""
        if self._only_shape:
            return self._only_shape
        try:
            route = self.route_of(line)
        except Refusal:
            return ANY_ROUTE.error_shape
        return ANY_ROUTE.error_shape if route is None else route.error_shape

    def names(self) -> Iterable[str]:
        """Every value that the metric label `route` can take."""
        return [*(row.route.name for row in self._compiled), ANY_ROUTE.name]

    def methods(self) -> frozenset[bytes]:
        """Every method that is served: the known ones, and those that a pattern names."""
        return KNOWN_METHODS | {row.method for row in self._compiled if row.method is not None}

    def _match(self, method: bytes, path: bytes, *, is_plain: bool) -> Route | None:
        if not self._compiled:
            return ANY_ROUTE
        row = self._first(method, path)
        route = None if row is None else row.route
        if is_plain:
            # Only repeated slashes can be read in another way, and most rows match no path that has them.
            if (row is None or row.has_rest) and path.find(b"//") >= 0:
                self._check_readings(method, path_readings.readings(path), route)
        elif self.forwards_encoded_slash and path_readings.has_encoded_slash(path):
            if row is not None:
                self._check_encoded_slash(method, path, row)
        elif path_readings.is_folded_by_some(path):
            self._check_readings(method, path_readings.readings(path), route)
        if self._calling and route is not None:
            self._check_calls(method, path, route)
        return route

    def _first(self, method: bytes, path: bytes) -> _Row | None:
        for row in self._compiled:
            if row.matches(method, path):
                return row
        return None

    def _check_readings(
        self, method: bytes, readings: Iterable[bytes], route: Route | None, *, may_meet_none: bool = False
    ) -> None:
        for reading in readings:
            row = self._first(method, reading)
            met = None if row is None else row.route
            if met is not route and not (may_meet_none and met is None):
                raise _ambiguous("the path matches another route once it is normalised")

    def _check_calls(self, method: bytes, path: bytes, route: Route) -> None:
        """Raise a Refusal if a lenient server reads the path as one of a route that judges other tools."""
        for reading in path_readings.all_readings(path):
            if not any(row.may_match(method, reading) for row in self._calling):
                continue
            first = next(row for row in self._compiled if row.may_match(method, reading))
            if _calls_tools(first.route) and not _judges_alike(first.route, route):
                raise _ambiguous("a server that reads leniently would take this for a request of a route of tools")

    def _check_encoded_slash(self, method: bytes, path: bytes, row: _Row) -> None:
        """Raise a Refusal unless every server reads the path as one of this route, or of none."""
        if not row.route.forwards_encoded_slash:
            raise _ambiguous("the path has an encoded slash, which the route does not forward")
        values = row.values.fullmatch(path)
        if values is None or any(path_readings.has_unstable_segment(value) for value in values.groups()):
            raise _ambiguous("a value with an encoded slash has an empty or dot segment")
        self._check_readings(method, path_readings.readings_that_keep(path), row.route)
        self._check_readings(method, path_readings.readings_that_split(path), row.route, may_meet_none=True)


def _lenient(pattern: PathPattern, route: Route) -> bytes:
    """An expression for the paths that a server could serve as this route's: in any case, with slashes at the end.

    For routes of tools also without the slash at the end, with a format or what follows `?` or `#` after it, and for
    MCP all below.
    """
    exact = pattern.compiled().pattern
    base = exact.removesuffix(b".*").rstrip(b"/")
    if not base or not _calls_tools(route):
        return b"(?:%b)/*" % exact
    more = rb"(?:[/ .?#].*)?" if route.protocol else rb"(?:[ .?#][^/]*)?/*"
    return b"(?:%b|%b%b)" % (exact, base, more)


def _calls_tools(route: Route) -> bool:
    return bool(route.tool or route.protocol)


def _judges_alike(one: Route, other: Route) -> bool:
    """Whether both routes call the same tools."""
    return one is other or (one.tool == other.tool and one.protocol == other.protocol)


def _ambiguous(detail: str) -> Refusal:
    return Refusal(Reason.REQUEST_MALFORMED, detail)
