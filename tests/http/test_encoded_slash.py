"""Encoded slashes: a forwarded one is read as a path of its route, or of none, by every server."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyproxy.http import request_target
from keyproxy.http.path_patterns import placeholder_pattern
from keyproxy.http.routes import RouteTable
from keyproxy.model import Route
from keyproxy.reasons import Refusal

FORWARDING = ("GET /v1/files/{id}", "GET /v1/models/{model}:run", "GET /v1/tree/{rest...}", "GET /v2/{a}/x/{b}")
OTHERS = ("GET /v1/files/{id}/meta", "GET /v1/models/{model}", "* /admin/{rest...}", "GET /v1/plain/{id}")


def table(*below: str) -> RouteTable:
    rows = [(pattern, Route(pattern, forwards_encoded_slash=pattern in FORWARDING)) for pattern in FORWARDING + OTHERS]
    return RouteTable([*rows, *[(pattern, Route(pattern)) for pattern in below]])


def outcome(routes: RouteTable, path: str | bytes) -> str:
    """The name of the route, `none`, `form` for a target that is refused, or `route` for a path that is."""
    sent = path.encode() if isinstance(path, str) else path
    try:
        target = request_target.judge(b"GET", sent, None, accepts_encoded_slash=routes.forwards_encoded_slash)
    except Refusal:
        return "form"
    assert target.target == sent
    try:
        route = routes.match(b"GET", target.path)
    except Refusal:
        return "route"
    return "none" if route is None else route.name


@pytest.mark.parametrize("path", ["/v1/files/a%2Fb", "/v1/files/%2f", "/a%2Fb?x=%2F", "/v1/plain/a%2fb"])
def test_without_a_route_that_forwards_them_encoded_slashes_are_refused_with_the_target(path: str) -> None:
    routes = RouteTable([(pattern, Route(pattern)) for pattern in FORWARDING])
    assert outcome(routes, path) == "form"
    assert outcome(routes, "/v1/files/a?b=%2F") == "GET /v1/files/{id}"


@pytest.mark.parametrize(
    ("path", "result"),
    [
        ("/v1/files/a", "GET /v1/files/{id}"),
        ("/v1/files/a%2Fb", "GET /v1/files/{id}"),
        ("/v1/files/a%2fb%2Fc%20d", "GET /v1/files/{id}"),
        ("/v1/files/a%2Fb.c", "GET /v1/files/{id}"),
        ("/v1/files/a%2F...%2F..a", "GET /v1/files/{id}"),
        ("/v1/files/a%2Fb;v=1", "GET /v1/files/{id}"),
        ("/v1/models/a%2Fb:run", "GET /v1/models/{model}:run"),
        ("/v1/tree/a%2Fb/c", "GET /v1/tree/{rest...}"),
        ("/v1/tree/a%2Fb%2Fc", "GET /v1/tree/{rest...}"),
        ("/v2/a%2Fb/x/c%2Fd", "GET /v2/{a}/x/{b}"),
        # Another reading meets another route.
        ("/v1/files/a%2Fmeta", "route"),
        ("/v1/files/a%2F%6Deta", "route"),
        ("/v1/files/a%2Fmeta;v", "route"),
        ("/v1/files/a;v%2Fmeta", "route"),
        ("/v1/files/a%3Bv%2Fmeta", "route"),
        ("/v1/%66iles/a%2Fb", "none"),
        ("/v1/models/a%2Fb:run;v", "route"),
        ("/v1/models/a:run;v", "route"),
        # The route does not forward, or there is none.
        ("/v1/plain/a%2Fb", "route"),
        ("/admin/a%2Fb", "route"),
        ("/admin%2Fb", "none"),
        ("/v1%2Ffiles%2Fa", "none"),
        ("/%2Fevil.example/a", "none"),
        ("/v1/files%2Fa", "none"),
        ("/other/a%2Fb", "none"),
        # Empty and dot segments.
        ("/v1/files/%2Fb", "route"),
        ("/v1/files/b%2F", "route"),
        ("/v1/files/%2F", "route"),
        ("/v1/files/a%2F%2Fb", "route"),
        ("/v1/files/a%2F..%2Fb", "route"),
        ("/v1/files/a%2F.%2Fb", "route"),
        ("/v1/files/..%2Fadmin", "route"),
        ("/v1/files/..%2F..%2Fadmin%2Fx", "route"),
        ("/v1/files/a%2F..", "route"),
        ("/v1/files/a%2F.", "route"),
        ("/v1/files/a%2F..;x", "route"),
        ("/v1/files/a%2F..%3Bx", "route"),
        ("/v1/files/a%2F..;x%2Fb", "route"),
        ("/v1/files/a%2F;x", "route"),
        ("/v1/files/a%2F%3B", "route"),
        ("/v1/files/;x%2Fb", "route"),
        ("/v1/tree/a%2Fb/", "route"),
        ("/v1/tree/a%2Fb//c", "route"),
        ("/v1/tree/..%2F..%2Fadmin%2Fx", "route"),
        ("/v1/tree/a/;x/b%2Fc", "route"),
        ("/v2/a/x/..%2Fb", "route"),
        # Every other rule about the form of a path applies.
        ("/v1/files/a%252Fb", "form"),
        ("/v1/files/a%25252Fb", "form"),
        ("/v1/files/a%2%46b", "form"),
        ("/v1/files/a%25%32%46b", "form"),
        ("/v1/files/a%252%66b", "form"),
        ("/v1/files/a%5Cb", "form"),
        ("/v1/files/a%2F%5Cb", "form"),
        ("/v1/files/%2E%2E%2Fb", "form"),
        ("/v1/files/a%2F%2E%2E", "form"),
        ("/v1/files/a%2F%00", "form"),
        ("/v1/files/a%2F%c0%af", "form"),
        ("/v1/files/%E2%2F%82%AC", "form"),
        ("/v1/files/%%2F2F", "form"),
        ("/v1/files/a%2F/../b", "form"),
        ("//a%2Fb", "form"),
    ],
)
def test_a_path_with_an_encoded_slash_meets_its_route_or_is_refused(path: str, result: str) -> None:
    assert outcome(table(), path) == result
    # As decided before, from the cache, and in the other case.
    routes = table()
    other = path.replace("%2F", "%2f") if "%2F" in path else path.replace("%2f", "%2F")
    assert [outcome(routes, one) for one in (path, other, path)] == [result] * 3


@pytest.mark.parametrize(
    ("path", "result"),
    [
        ("/v1/files/a%2Fb", "route"),
        ("/v1/models/a%2Fb:run", "route"),
        ("/v1/tree/a%2Fb", "GET /v1/tree/{rest...}"),
        ("/other/a%2Fb", "route"),
        ("/v1/files/a", "GET /v1/files/{id}"),
    ],
)
def test_above_a_catch_all_only_a_remainder_may_have_encoded_slashes(path: str, result: str) -> None:
    assert outcome(table("* /{rest...}"), path) == result


# -- independent readers


def cut(path: bytes) -> bytes:
    return b"/".join(segment.partition(b";")[0] for segment in path.split(b"/"))


def merged(path: bytes) -> bytes:
    while b"//" in path:
        path = path.replace(b"//", b"/")
    return path


def resolved(path: bytes) -> bytes:
    """Dot segments removed, as by a file system or RFC 3986; a slash at the end stays."""
    plain = b"/" + posixpath.normpath(path).lstrip(b"/")
    return plain + b"/" if path.endswith(b"/") and plain != b"/" else plain


def same(path: bytes) -> bytes:
    return path


def decoded_but_slashes(path: bytes) -> bytes:
    return b"%2F".join(unquote_to_bytes(part) for part in re.split(rb"(?i)%2f", path))


def only_slashes(path: bytes) -> bytes:
    return re.sub(rb"(?i)%2f", b"/", path)


Step = Callable[[bytes], bytes]
KEEPING: tuple[Step, ...] = (same, decoded_but_slashes)
SPLITTING: tuple[Step, ...] = (unquote_to_bytes, only_slashes)


def read(path: bytes, decoding: Step) -> set[bytes]:
    """What servers make of a path that decode it in this way: with parameters or dot segments removed before or after."""
    found = set()
    for before, after, last in itertools.product((same, cut, merged), (same, cut), (same, merged, resolved)):
        found.add(last(after(decoding(before(path)))))
    return found


def taken_literally(path: bytes) -> str:
    for name, pattern in (
        ("GET /v1/files/{id}", rb"/v1/files/[^/]+"), ("GET /v1/models/{model}:run", rb"/v1/models/[^/]+:run"),
        ("GET /v1/tree/{rest...}", rb"/v1/tree/.*"), ("GET /v2/{a}/x/{b}", rb"/v2/[^/]+/x/[^/]+"),
        ("GET /v1/files/{id}/meta", rb"/v1/files/[^/]+/meta"), ("GET /v1/models/{model}", rb"/v1/models/[^/]+"),
        ("* /admin/{rest...}", rb"/admin/.*"), ("GET /v1/plain/{id}", rb"/v1/plain/[^/]+"),
    ):  # fmt: skip
        if re.fullmatch(pattern, path):
            return name
    return "none"


PIECES = [
    b"%2F", b"%2f", b"/", b"a", b"b", b";", b";x", b"%3b", b".", b"..", b"%61", b"meta", b":run", b"admin", b"%20",
    b"%25", b"%2e", b"%5c", b"x", b"v1", b"/x/", b"%6deta",
]  # fmt: skip
STARTS = [b"/v1/files/", b"/v1/models/", b"/v1/tree/", b"/v2/", b"/v1/plain/", b"/admin/", b"/"]


@given(st.sampled_from(STARTS), st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join))
@example(b"/v1/files/", b"a%2F..;x")
@example(b"/v1/tree/", b"a%2Fb;/..;x/c")
@example(b"/v1/files/", b"a;%2Fmeta")
@settings(max_examples=1_000)
def test_every_reader_of_a_forwarded_path_meets_its_route_or_none(start: bytes, tail: bytes) -> None:
    path = start + tail
    name = outcome(table(), path)
    if name in ("form", "route", "none") or b"%2f" not in path.lower():
        return
    assert name in FORWARDING
    for decoding in KEEPING:
        assert {taken_literally(reading) for reading in read(path, decoding)} == {name}
    for decoding in SPLITTING:
        assert {taken_literally(reading) for reading in read(path, decoding)} <= {name, "none"}


@given(st.sampled_from(STARTS), st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join))
@settings(max_examples=500)
def test_a_path_without_an_encoded_slash_is_judged_as_if_no_route_forwarded_them(start: bytes, tail: bytes) -> None:
    path = start + re.sub(rb"(?i)%2f", b"", tail)
    if b"%2f" in path.lower():
        return
    plain = RouteTable([(pattern, Route(pattern)) for pattern in FORWARDING + OTHERS])
    assert outcome(table(), path) == outcome(plain, path)


# -- values


@pytest.mark.parametrize(
    ("text", "name", "path", "value"),
    [
        ("GET /v1/{tenant}/x", "tenant", b"/v1/acme/x", "acme"),
        ("GET /v1/{tenant}/x", "tenant", b"/v1/acme%2Fdocs/x", "acme/docs"),
        ("GET /v1/{tenant}/{id}", "id", b"/v1/a%2Fb/c%2fd", "c/d"),
        ("GET /v1/{model}:run", "model", b"/v1/a:run:run", "a:run"),
        ("GET /v1/{model}:run", "model", b"/v1/org%2Fname:run", "org/name"),
        ("GET /v1/{rest...}", "rest", b"/v1/a%2Fb/c%20d", "a/b/c d"),
        ("GET /v1/{rest...}", "rest", b"/v1/", ""),
        ("GET /v1/{id}", "id", b"/v1/%2561", "%61"),
        ("GET /v1/{id}", "id", b"/v1/caf%C3%A9", "café"),
        ("GET /v1/{id}", "id", b"/v1/a+b", "a+b"),
        ("GET /v1/{id}", "id", b"/v2/a", None),
    ],
)
def test_the_value_of_a_placeholder_is_its_group_in_the_path_as_sent(
    text: str, name: str, path: bytes, value: str | None
) -> None:
    match = placeholder_pattern(text, name).fullmatch(path)
    assert (None if match is None else unquote_to_bytes(match[1]).decode()) == value
