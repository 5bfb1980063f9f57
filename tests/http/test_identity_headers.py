"""The upstream gets exactly one of each identity header, set by the proxy, whatever the client sends."""

from __future__ import annotations

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from keyproxy.http import headers
from keyproxy.http.forwarding import TrustRule
from keyproxy.http.headers import FieldNames
from keyproxy.model import Grant, Permit, Route
from keyproxy.reasons import Refusal
from keyproxy.wire.parsing.head_cache import RequestReader
from keyproxy.wire.parsing.head_templates import LEARNT_AFTER
from tests import fakes, header_strategies

WHO = fakes.identity("u_42", "acme", scopes=frozenset({"jobs:read", "jobs:write"}))
PERMIT = Permit(Grant(WHO, Route("any")))
OURS = {
    b"x-keyproxy-user": b"u_42",
    b"x-keyproxy-tenant": b"acme",
    b"x-keyproxy-scope": b"jobs:read jobs:write",
    b"x-keyproxy-test": b"false",
    b"x-keyproxy-key-id": b"key_of_u_42",
    b"x-request-id": b"r-ours",
    b"x-forwarded-for": b"10.0.0.1",
    b"x-forwarded-proto": b"http",
    b"x-forwarded-host": b"a.example",
}
ENDS_HERE = {
    b"authorization", b"x-api-key", b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"proxy-authorization",
    b"forwarded", b"x-real-ip", b"expect", b"transfer-encoding", b"x-original-url",
}  # fmt: skip
FORWARDING = TrustRule([]).forwarding("10.0.0.1", is_tls=False)


def dressed(reader: RequestReader, raw: bytes) -> bytes | None:
    """The head that goes upstream; None for one that does not."""
    try:
        head = reader.read(raw, len(raw) - 4)
    except Refusal:
        return None
    return headers.build_upstream_head(
        head, head.block, PERMIT, request_id=b"r-ours", forwarding=FORWARDING, host=b"upstream.example"
    )


def lines_of(head: bytes) -> list[bytes]:
    return head.removesuffix(b"\r\n\r\n").split(b"\r\n")[1:]


def canonical(line: bytes) -> bytes:
    """The line's name as the most lenient server reads it: any case, `_` or `.` for `-`, spaces around it."""
    return folded(line.partition(b":")[0])


def folded(name: bytes) -> bytes:
    return name.strip().lower().replace(b"_", b"-").replace(b".", b"-")


def end_to_end(head: bytes) -> list[bytes]:
    """The end-to-end lines of a client's head."""
    options = b",".join(line.partition(b":")[2] for line in lines_of(head) if canonical(line) == b"connection")
    gone = ENDS_HERE | {folded(option) for option in options.split(b",")}
    ours = (b"x-keyproxy-", b"x-forwarded-", b"x-request-id")
    kept: list[bytes] = []
    for line in lines_of(head):
        name = canonical(line)
        if name in gone or name.startswith(ours):
            continue
        if name == b"content-length":  # forwarded as plain digits
            line = b"%b: %d" % (line.partition(b":")[0], int(line.partition(b":")[2]))
        if name == b"content-type" and name in map(canonical, kept):
            continue  # repeated, and equal
        kept.append(line)
    return kept


def check(sent: bytes, head: bytes) -> None:
    """`head` is what goes upstream of what was `sent`."""
    assert head.endswith(b"\r\n\r\n")
    assert head.count(b"\r\n") == head.count(b"\r") == head.count(b"\n") == len(lines_of(head)) + 2
    assert all(b":" in line for line in lines_of(head))
    framing = [b"Transfer-Encoding: chunked"] if b"transfer-encoding" in map(canonical, lines_of(sent)) else []
    by_us = [b"%b: %b" % (name.title(), value) for name, value in OURS.items()]
    kept, added = end_to_end(sent), lines_of(head)[len(end_to_end(sent)) :]
    assert lines_of(head)[: len(kept)] == kept
    assert sorted(added) == sorted([*by_us, *framing])


@given(st.lists(header_strategies.hostile_heads(), min_size=1, max_size=3))
@settings(max_examples=150)
def test_no_spelling_of_a_reserved_name_reaches_the_upstream(heads: list[bytes]) -> None:
    reader = RequestReader(FieldNames(), fakes.holds_key)
    for raw in heads * 2:
        head = dressed(reader, raw)
        event("refused" if head is None else "forwarded")
        if head is not None:
            check(raw, head)


@given(header_strategies.similar_heads())
@example([b"GET / HTTP/1.1\r\nHost: a.example\r\nX-A: b\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a.example\r\nX-A\r\n\r\n"])
@settings(max_examples=150)
def test_no_arbitrary_head_does_either(heads: list[bytes]) -> None:
    reader = RequestReader(FieldNames(), fakes.holds_key)
    for raw in heads * 2:
        head = dressed(reader, raw)
        if head is not None and b" a.example\r\n" in raw:
            check(raw, head)


def named_users(head: bytes) -> list[bytes]:
    """The values of Act-For in any spelling; two if the header is ambiguous."""
    name = b"x-keyproxy-act-for"
    options = b",".join(line.partition(b":")[2] for line in lines_of(head) if canonical(line) == b"connection")
    found = [line.partition(b":")[2].strip(b" \t") for line in lines_of(head) if canonical(line) == name]
    return found + [b"named in Connection"] * 2 * (name in map(folded, options.split(b",")))


@given(st.lists(header_strategies.hostile_heads() | header_strategies.act_for_heads(), min_size=1, max_size=4))
@settings(max_examples=300)
def test_act_for_is_read_as_the_one_user_that_is_named_or_the_request_is_refused(heads: list[bytes]) -> None:
    reader, like = RequestReader(FieldNames(), fakes.holds_key), None
    for raw in heads * (LEARNT_AFTER + 2):
        expected, detail = named_users(raw), ""
        try:
            like = reader.read(raw, len(raw) - 4, like)
        except Refusal as refusal:
            detail = refusal.detail
        if detail:
            event("refused")
            assert len(expected) > 1 or "Act-For" not in detail
        else:
            event(f"{len(expected)} users")
            assert like is not None
            assert ([] if like.act_for is None else [like.act_for]) == expected


def test_the_head_that_goes_upstream_is_this() -> None:
    raw = (
        b"POST /v1/jobs?a=%2e HTTP/1.1\r\nhost: a.example\r\nX-Keyproxy-User: evil\r\nx_keyproxy_test: true\r\n"
        b"Connection: X-Gone, x-keyproxy-tenant, X-Request-Id\r\nX-Gone: 1\r\nAuthorization: Api-Key k\r\n"
        b"Cookie: a=b\r\nX-Request-Id: evil\r\nX_Request_Id: evil\r\nX-Forwarded-For: 1.1.1.1\r\n"
        b"Transfer-Encoding: chunked\r\nZ:  z \r\n\r\n"
    )
    assert dressed(RequestReader(FieldNames(), fakes.holds_key), raw) == (
        b"POST /v1/jobs?a=%2e HTTP/1.1\r\nhost: a.example\r\nCookie: a=b\r\nZ:  z \r\n"
        b"X-Keyproxy-User: u_42\r\nX-Keyproxy-Tenant: acme\r\nX-Keyproxy-Scope: jobs:read jobs:write\r\n"
        b"X-Keyproxy-Test: false\r\nX-Keyproxy-Key-Id: key_of_u_42\r\n"
        b"X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: a.example\r\n"
        b"X-Request-Id: r-ours\r\nTransfer-Encoding: chunked\r\n\r\n"
    )


def test_an_http_1_0_request_without_host_gets_the_host_of_the_upstream() -> None:
    raw = b"POST / HTTP/1.0\r\nContent-Length: 5\r\n\r\n"
    head = dressed(RequestReader(FieldNames(), fakes.holds_key), raw)
    assert head is not None
    assert head.startswith(
        b"POST / HTTP/1.1\r\nHost: upstream.example\r\nContent-Length: 5\r\nX-Keyproxy-User: u_42\r\n"
    )
    assert b"X-Forwarded-Host" not in head
