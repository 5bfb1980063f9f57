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
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from keyproxy.http import path_readings
from keyproxy.http.path_patterns import PathPattern, parse_pattern
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

#: The number of matched paths that are cached; then the cache is cleared. Paths contain ids, so most never recur.
_REMEMBERED_MAX: Final = 4096
_REMEMBERED_BYTES_MAX: Final = 256


class _Row(NamedTuple):
    """A compiled route. `method` None: any. `values`: matches like `pattern`, with a group for each placeholder.

    `lenient`: what servers that read leniently match, see `_lenient`.
    """

    method: bytes | None
    pattern: re.Pattern[bytes]
    values: re.Pattern[bytes]
    lenient: re.Pattern[bytes]
    route: Route


class RouteTable:
    """Compiled routes. `match` never waits and keeps no state that a decision depends on."""

    def __init__(self, routes: Sequence[tuple[str, Route]]) -> None:
        """`routes`: patterns with their routes, in order. Raises InvalidPatternError."""
        #: The patterns with their routes.
        self.rows: Final = tuple(routes)
        self.has_public: Final = any(route.is_public for _, route in routes)
        self.forwards_encoded_slash: Final = any(route.forwards_encoded_slash for _, route in routes)
        self._compiled = [_compiled(pattern, route) for pattern, route in routes]
        self._calling = [row for row in self._compiled if _calls_tools(row.route)]
        self._remembered: dict[tuple[bytes, bytes], Route | None] = {}
        shapes = {ANY_ROUTE.error_shape, *(route.error_shape for _, route in routes)}
        #: The error format of all requests, if there is only one.
        self._only_shape = ANY_ROUTE.error_shape if len(shapes) == 1 else ""

    def match(self, method: bytes, path: bytes) -> Route | None:
        """The first route for this method and raw path, None if there is none.

        Raises a Refusal (REQUEST_MALFORMED) for a path that servers could read as one of another route.
        """
        if not self._compiled:
            return ANY_ROUTE
        try:
            return self._remembered[method, path]
        except KeyError:
            pass
        row = self._first(method, path)
        route = None if row is None else row.route
        if self.forwards_encoded_slash and path_readings.has_encoded_slash(path):
            if row is not None:
                self._check_encoded_slash(method, path, row)
        elif path_readings.is_folded_by_some(path):
            self._check_readings(method, path_readings.readings(path), route)
        if self._calling and route is not None:
            self._check_calls(method, path, route)
        if len(self._remembered) >= _REMEMBERED_MAX:
            self._remembered.clear()
        if len(path) <= _REMEMBERED_BYTES_MAX:
            self._remembered[method, path] = route
        return route

    def public(self, method: bytes, path: bytes) -> Route | None:
        """The public route for this method and raw path; None if a key is needed, or the path is ambiguous."""
        try:
            route = self.match(method, path)
        except Refusal:
            return None
        return route if route is not None and route.is_public else None

    def error_shape(self, method: bytes, path: bytes) -> str:
        """The error format of the route for this method and raw path; the default if none matches unambiguously."""
        if self._only_shape:
            return self._only_shape
        try:
            route = self.match(method, path)
        except Refusal:
            return ANY_ROUTE.error_shape
        return ANY_ROUTE.error_shape if route is None else route.error_shape

    def names(self) -> Iterable[str]:
        """Every value that the metric label `route` can take."""
        return [*(row.route.name for row in self._compiled), ANY_ROUTE.name]

    def methods(self) -> frozenset[bytes]:
        """Every method that is served: the known ones, and those that a pattern names."""
        return KNOWN_METHODS | {row.method for row in self._compiled if row.method is not None}

    def _first(self, method: bytes, path: bytes) -> _Row | None:
        for row in self._compiled:
            if _meets(row, method, row.pattern, path):
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
            if not any(_may_meet(row, method, reading) for row in self._calling):
                continue
            first = next(row for row in self._compiled if _may_meet(row, method, reading))
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


def _compiled(text: str, route: Route) -> _Row:
    pattern = parse_pattern(text)
    lenient = re.compile(_lenient(pattern, route), re.IGNORECASE | re.DOTALL)
    return _Row(pattern.method, pattern.compiled(), pattern.compiled(captured=None), lenient, route)


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


def _meets(row: _Row, method: bytes, pattern: re.Pattern[bytes], path: bytes) -> bool:
    return (row.method is None or row.method == method) and pattern.fullmatch(path) is not None


def _may_meet(row: _Row, method: bytes, path: bytes) -> bool:
    """Whether a server that reads leniently could take a request for one of this row."""
    return _meets(row, method, row.lenient, path) or (method == b"HEAD" and _meets(row, b"GET", row.lenient, path))


def _calls_tools(route: Route) -> bool:
    return bool(route.tool or route.protocol)


def _judges_alike(one: Route, other: Route) -> bool:
    """Whether both routes call the same tools."""
    return one is other or (one.tool == other.tool and one.protocol == other.protocol)


def _ambiguous(detail: str) -> Refusal:
    return Refusal(Reason.REQUEST_MALFORMED, detail)
