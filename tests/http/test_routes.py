"""The route table: matching, and that no spelling of a path bypasses it."""

from __future__ import annotations

import re
from itertools import product
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from keyproxy.http import path_readings
from keyproxy.http.headers import FieldNames
from keyproxy.http.path_patterns import InvalidPatternError, parse_pattern
from keyproxy.http.routes import ANY_ROUTE, KNOWN_METHODS, RouteTable, _Row
from keyproxy.http_messages import RequestLine
from keyproxy.model import Route
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing.head_cache import RequestReader
from tests import fakes


def table(*patterns: str) -> RouteTable:
    return RouteTable([(pattern, Route(pattern)) for pattern in patterns])


def matched(routes_: RouteTable, path: bytes, method: bytes = b"GET") -> str | None:
    """The name of the route; None: no route; `refused`: the readings disagree."""
    try:
        route = routes_.match(method, path)
    except Refusal as refusal:
        if refusal.reason is not Reason.REQUEST_MALFORMED:
            raise
        return "refused"
    return None if route is None else route.name


@pytest.mark.parametrize(
    ("pattern", "method", "path", "matches"),
    [
        ("POST /v1/jobs", b"POST", b"/v1/jobs", True),
        ("POST /v1/jobs", b"GET", b"/v1/jobs", False),
        ("POST /v1/jobs", b"POST", b"/v1/jobs/", False),
        ("POST /v1/jobs", b"POST", b"/v1/jobs2", False),
        ("POST /v1/jobs", b"POST", b"/x/v1/jobs", False),
        ("POST /v1/jobs", b"POST", b"/V1/jobs", False),
        ("* /a", b"DELETE", b"/a", True),
        ("GET /", b"GET", b"/", True),
        ("GET /", b"GET", b"*", False),
        ("GET /a/", b"GET", b"/a/", True),
        ("GET /a/", b"GET", b"/a", False),
        ("GET /a.b", b"GET", b"/a.b", True),
        ("GET /a.b", b"GET", b"/axb", False),
        ("GET /a+(b)*$", b"GET", b"/a+(b)*$", True),
        ("GET /*", b"GET", b"/*", True),
        ("GET /*", b"GET", b"/a", False),
        ("M-SEARCH /a", b"M-SEARCH", b"/a", True),
        ("GET /{id}", b"GET", b"/7", True),
        ("GET /{id}", b"GET", b"/", False),
        ("GET /{id}", b"GET", b"/7/8", False),
        ("GET /a/{id}/b", b"GET", b"/a/7/b", True),
        ("GET /a/{id}/b", b"GET", b"/a/b", False),
        ("GET /a/{rest...}", b"GET", b"/a/", True),
        ("GET /a/{rest...}", b"GET", b"/a/b/c", True),
        ("GET /a/{rest...}", b"GET", b"/a", False),
        ("GET /a/{rest...}", b"GET", b"/ab", False),
        ("GET /{rest...}", b"GET", b"/", True),
        ("GET /{model}:run", b"GET", b"/a:run", True),
        ("GET /{model}:run", b"GET", b"/a:run:run", True),
        ("GET /{model}:run", b"GET", b"/:run", False),
        ("GET /{model}:run", b"GET", b"/a:running", False),
        ("GET /{model}:run", b"GET", b"/a/b:run", False),
        ("GET /{model}:run", b"GET", b"/a:run/", False),
        ("GET /{a}.json/{b}", b"GET", b"/x.json/y", True),
        ("GET /{a}.json/{b}", b"GET", b"/xjson/y", False),
    ],
)
def test_a_pattern_matches_whole_paths_of_its_method(pattern: str, method: bytes, path: bytes, matches: bool) -> None:
    assert matched(table(pattern), path, method) == (pattern if matches else None)


def test_without_routes_any_path_is_allowed() -> None:
    assert table().match(b"PUT", b"/x;y//%61") is ANY_ROUTE


@pytest.mark.parametrize(
    ("patterns", "first"),
    [(("GET /{x}", "GET /a"), "GET /{x}"), (("GET /a", "GET /{x}"), "GET /a"), (("POST /a", "* /a"), "* /a")],
)
def test_the_first_match_wins(patterns: tuple[str, ...], first: str) -> None:
    assert matched(table(*patterns), b"/a") == first


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (b"/models/a:run", "POST /models/{model}:run"),
        (b"/models/a%3Arun", "refused"),
        (b"/models/a:run;v=1", "refused"),
        (b"/models/a:%72un", "refused"),
        (b"/models/%61:run", "POST /models/{model}:run"),
        (b"/models/a:list", "* /models/{model}"),
    ],
)
def test_text_after_a_placeholder_is_matched_as_sent_and_normalised(path: bytes, name: str) -> None:
    assert matched(table("POST /models/{model}:run", "* /models/{model}"), path, b"POST") == name


@pytest.mark.parametrize(
    "pattern",
    [
        "", "GET", "GET ", "/a", " /a", "get /a", "G3T /a", "GET,POST /a", "GET a", "GET  /a", "GET /a b", "GET /a?b",
        "GET /a#b", "GET /{", "GET /{}", "GET /{Id}", "GET /{1}", "GET /a{id}", "GET /{id}{b}", "GET /{rest...}/b",
        "GET /{id}b{x}", "GET /{rest...}b",
        "GET /{id}%20", "GET /{id};v", "GET /{id}/{id}", "GET /{id}/{id...}",
        "GET /{rest..}", "GET /é", "GET /a\n", "GET http://a/b", "*/a", "** /a",
    ],
)  # fmt: skip
def test_invalid_pattern_is_rejected_at_start(pattern: str) -> None:
    with pytest.raises(InvalidPatternError):
        table(pattern)


@pytest.mark.parametrize("pattern", ["GET /a%20b", "GET /a;b", "GET /a//b", "GET //", "GET /%7Ea", "GET /a;v=1/b"])
def test_a_pattern_is_refused_or_matches_its_own_text(pattern: str) -> None:
    try:
        routes_ = table(pattern)
    except InvalidPatternError:
        return
    assert matched(routes_, pattern.partition(" ")[2].encode()) == pattern


@pytest.mark.parametrize(
    ("path", "reading"),
    [
        (b"/a/b", b"/a/b"),
        (b"/%61", b"/a"),
        (b"//a///b//", b"/a/b/"),
        (b"/a;x=1/b;y", b"/a/b"),
        (b"/a%3bx", b"/a"),
        (b"/;x", b"/"),
        (b"/%2561", b"/%61"),
    ],
)
def test_a_path_has_the_reading_of_a_lenient_server(path: bytes, reading: bytes) -> None:
    assert {path, reading} <= path_readings.readings(path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (b"/admin/x", "GET /admin/{id}"),
        (b"/other/x", "* /{rest...}"),
        (b"/other//x", "* /{rest...}"),
        (b"/other/%78", "* /{rest...}"),
        (b"/admin/%78", "GET /admin/{id}"),
        (b"/%61dmin/x", "refused"),
        (b"//admin/x", "refused"),
        (b"/admin//x", "refused"),
        (b"/admin;v=1/x", "refused"),
        (b"/admin%3bv/x", "refused"),
        (b"/x/../admin/x", "* /{rest...}"),  # never reaches the route table: see the tests of targets
    ],
)
def test_a_narrow_route_is_not_evaded_by_spelling_its_path_otherwise(path: bytes, name: str) -> None:
    assert matched(table("GET /admin/{id}", "* /{rest...}"), path) == name


def readings(path: bytes) -> set[bytes]:
    """Every combination of what servers are known to do to a path."""
    found = set()
    for cuts_first, decodes, cuts_last, joins in product([False, True], repeat=4):
        reading = path
        if cuts_first:
            reading = re.sub(rb";[^/]*", b"", reading)
        if decodes:
            reading = unquote_to_bytes(reading)
        if cuts_last:
            reading = re.sub(rb";[^/]*", b"", reading)
        found.add(re.sub(rb"/{2,}", b"/", reading) if joins else reading)
    return found


@given(
    st.lists(st.sampled_from([b"", b"a", b"%61", b"a;x", b";", b";x", b"%3bx", b"b", b"1"]), max_size=5).map(b"/".join)
)
@example(b"/a/;")
@example(b"%61/;x")
@settings(max_examples=500)
def test_all_readings_of_a_matched_path_match_the_same_route(tail: bytes) -> None:
    name = matched(table("GET /a/{id}", "GET /b", "* /{rest...}"), b"/" + tail)
    if name != "refused":
        assert {taken_literally(reading) for reading in readings(b"/" + tail)} == {name}


def taken_literally(path: bytes) -> str:
    if re.fullmatch(b"/a/[^/]+", path):
        return "GET /a/{id}"
    return "GET /b" if path == b"/b" else "* /{rest...}"


@given(st.lists(st.sampled_from([b"/a", b"/b", b"/a/1", b"/%61", b"//a", b"/c"]), max_size=12))
def test_cached_matches_do_not_affect_others(paths: list[bytes]) -> None:
    patterns = ("GET /a", "GET /b", "GET /a/{id}")
    used = table(*patterns)
    assert [matched(used, path) for path in paths] == [matched(table(*patterns), path) for path in paths]


def a_line(target: bytes) -> RequestLine:
    raw = b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % target
    return RequestReader(FieldNames(), fakes.holds_key, accepts_encoded_slash=True).read(raw, len(raw) - 4).line


PIECES = st.sampled_from([b"/", b"//", b"a", b"b", b"1", b".", b"..", b"_", b";", b"%61", b"%2f", b"%3b", b"%2e", b"?"])


@given(st.lists(PIECES, max_size=7).map(b"".join))
@example(b"/a//1")
@example(b"a//")
@settings(max_examples=500)
def test_a_request_line_matches_as_its_path_does(rest: bytes) -> None:
    """A line that was found to be plain is matched with fewer checks."""
    rows = [
        ("GET /a/{id}", Route("a")),
        ("GET /b", Route("b", forwards_encoded_slash=True)),
        ("* /{rest...}", ANY_ROUTE),
    ]
    for routes_ in (RouteTable(rows), RouteTable(rows[:2]), RouteTable(rows[:1])):
        try:
            line = a_line(b"/" + rest)
        except Refusal:
            return
        try:
            found = None if (route := routes_.route_of(line)) is None else route.name
        except Refusal:
            found = "refused"
        assert found == matched(routes_, line.path)
        event(f"{found}, {line.is_plain}")


def test_a_kept_line_matches_the_table_that_is_asked() -> None:
    """Another table is in use after a reload; the lines of a connection stay."""
    line, old, new = a_line(b"/a"), table("GET /a"), table("GET /{id}")
    assert [old.route_of(line), new.route_of(line), old.route_of(line)] == [
        old.match(b"GET", b"/a"), new.match(b"GET", b"/a"), old.match(b"GET", b"/a"),
    ]  # fmt: skip
    assert table("GET /b").route_of(line) is None


def test_the_names_are_those_of_all_routes_and_of_any() -> None:
    assert list(table("GET /a", "* /b").names()) == ["GET /a", "* /b", "any"]


@pytest.mark.parametrize("method", ["TRACE", "CONNECT"])
def test_a_route_for_a_method_that_is_always_refused_is_an_error(method: str) -> None:
    with pytest.raises(InvalidPatternError, match="never match"):
        RouteTable([(f"{method} /a", Route("a"))])


def test_a_method_that_a_route_names_is_served() -> None:
    assert RouteTable([]).methods() == KNOWN_METHODS
    assert RouteTable([("* /a", Route("a")), ("BREW /b", Route("b"))]).methods() == KNOWN_METHODS | {b"BREW"}
    assert not KNOWN_METHODS & {b"TRACE", b"CONNECT", b"BREW", b"get"}


def calling(*rows: tuple[str, str]) -> RouteTable:
    """Routes of a tool, or of MCP, or of none."""
    return RouteTable(
        [(match, Route(match, protocol="mcp") if tool == "mcp" else Route(match, tool=tool)) for match, tool in rows]
    )


MCP_AND_REST = (("* /mcp", "mcp"), ("POST /v1/{tenant}/pay", "pay"), ("* /{rest...}", ""))


@pytest.mark.parametrize(
    ("path", "route"),
    [
        (b"/mcp", "* /mcp"), (b"/v1/acme/pay", "POST /v1/{tenant}/pay"), (b"/v1/ACME/pay", "POST /v1/{tenant}/pay"),
        (b"/mcp/", None), (b"/mcp//", None), (b"/MCP", None), (b"/Mcp/", None), (b"/m%63p/", None), (b"/%4Dcp", None),
        (b"/mcp/;x", None), (b"/MCP;x", None), (b"//MCP", None), (b"/v1/acme/Pay", None), (b"/V1/acme/pay/", None),
        (b"/v1/acme/pay.json", None), (b"/v1/acme/Pay.json/", None), (b"/v1/acme/pay.", None), (b"/v1/acme/pay%20", None),
        (b"/v1/acme/pay%3Fx", None), (b"/v1/acme/pay%23x", None), (b"/v1/acme/pay%2Ejson", None), (b"/mcp.json", None),
        (b"/mcp/x", None), (b"/MCP/x/y", None), (b"/mcp/x;y", None), (b"/mcp%20", None),
        (b"/mcps", "* /{rest...}"), (b"/x/mcp", "* /{rest...}"), (b"/mcp-x/y", "* /{rest...}"),
        (b"/v1/acme/pays", "* /{rest...}"), (b"/v1/acme/pay/x", "* /{rest...}"), (b"/v1/acme/pay.x/y", "* /{rest...}"),
    ],
)  # fmt: skip
def test_tool_is_not_called_by_another_spelling_of_its_path(path: bytes, route: str | None) -> None:
    routes_ = calling(*MCP_AND_REST)
    for _ in range(2):
        if route is None:
            with pytest.raises(Refusal) as refused:
                routes_.match(b"POST", path)
            assert refused.value.reason is Reason.REQUEST_MALFORMED
        else:
            found = routes_.match(b"POST", path)
            assert found is not None
            assert found.name == route


def test_another_spelling_of_a_path_is_matched_where_no_broad_route_follows_or_its_own_route_judges_alike() -> None:
    assert calling(*MCP_AND_REST[:2]).match(b"POST", b"/mcp/") is None
    both = calling(("* /mcp", "mcp"), ("* /mcp/", "mcp"), ("* /{rest...}", ""))
    found = both.match(b"POST", b"/mcp/")
    assert found is not None
    assert found.name == "* /mcp/"
    first = calling(("POST /v1/List", ""), ("POST /v1/{tool}", "pay"), ("* /{rest...}", ""))
    plain = first.match(b"POST", b"/v1/List")
    assert plain is not None
    assert plain.tool == ""


@pytest.mark.parametrize("match", ["* /mcp/", "* /mcp/{rest...}"])
def test_mcp_server_at_a_path_with_a_slash_is_not_reached_without_it(match: str) -> None:
    routes_ = calling((match, "mcp"), ("* /{rest...}", ""))
    found = routes_.match(b"POST", b"/mcp/")
    assert found is not None
    assert found.protocol == "mcp"
    for path in (b"/mcp", b"/MCP", b"/mcp.json"):
        with pytest.raises(Refusal):
            routes_.match(b"POST", path)


def test_tool_that_is_called_with_get_is_not_called_with_head() -> None:
    routes_ = calling(("GET /export", "export"), ("* /{rest...}", ""))
    for path in (b"/export", b"/Export/"):
        with pytest.raises(Refusal):
            routes_.match(b"HEAD", path)
    assert routes_.match(b"POST", b"/export") is not None
    assert calling(("GET /export", "export")).match(b"HEAD", b"/export") is None


def test_row_above_a_route_of_tools_exempts_a_path_that_resembles_it() -> None:
    routes_ = calling(
        ("GET /mcp/health", ""), ("GET /pay.csv", ""), ("HEAD /export", ""),
        ("* /mcp", "mcp"), ("* /pay", "pay"), ("GET /export", "export"), ("* /{rest...}", ""),
    )  # fmt: skip
    for method, path in ((b"GET", b"/mcp/health"), (b"GET", b"/pay.csv"), (b"HEAD", b"/export")):
        found = routes_.match(method, path)
        assert found is not None
        assert found.name == f"{method.decode()} {path.decode()}"
    for method, path in ((b"POST", b"/mcp/health"), (b"POST", b"/pay.csv")):
        with pytest.raises(Refusal):
            routes_.match(method, path)


def test_mcp_server_at_the_root_leaves_other_paths_to_their_routes() -> None:
    found = calling(("* /", "mcp"), ("* /{rest...}", "")).match(b"POST", b"/jobs")
    assert found is not None
    assert not found.protocol


def test_other_spellings_of_routes_that_call_no_tools_are_matched_as_before() -> None:
    for path in (b"/JOBS", b"/jobs/"):
        found = table("GET /jobs", "* /{rest...}").match(b"GET", path)
        assert found is not None
        assert found.name == "* /{rest...}"


@given(
    st.sampled_from(["/", "/a", "/a/b", "/a/{id}", "/{id}", "/a/{rest...}", "/{rest...}", "/{id}/b", "/a/{id}:run"]),
    st.text("ab/:\n%run", max_size=8),
)
def test_a_pattern_without_an_expression_matches_as_its_expression_does(pattern: str, path: str) -> None:
    raw = b"/" + path.encode()
    row = _Row(parse_pattern(f"GET {pattern}"), ANY_ROUTE)
    assert row.matches(b"GET", raw) == (parse_pattern(f"GET {pattern}").compiled().fullmatch(raw) is not None)
