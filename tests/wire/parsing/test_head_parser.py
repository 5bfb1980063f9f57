"""Which heads are read at all, and as what."""

from __future__ import annotations

import re

import pytest
from hypothesis import given

from keyproxy.http.headers import FieldNames
from keyproxy.http.routes import KNOWN_METHODS
from keyproxy.http_messages import CredentialField, RequestFields, RequestLine, ResponseFields, StatusLine
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing.head_beginnings import check_beginning, refused_line
from keyproxy.wire.parsing.head_cache import RequestReader, ResponseReader
from keyproxy.wire.parsing.head_parser import has_no_body, parse_request, parse_response
from keyproxy.wire.parsing.head_templates import LEARNT_AFTER
from keyproxy.wire.parsing.header_fields import ParsedFields
from tests import fakes, header_strategies
from tests.auth.test_agent_token_format import HEADER, jwt

NAMES = FieldNames()
HOST = b"Host: a.example\r\n"


def request(fields: bytes = b"", *, start: bytes = b"POST /a HTTP/1.1", host: bytes = HOST) -> bytes:
    return b"%b\r\n%b%b\r\n" % (start, host, fields and fields + b"\r\n")


def response(fields: bytes = b"", *, start: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"%b\r\n%b\r\n" % (start, fields and fields + b"\r\n")


def accepted(raw: bytes) -> tuple[RequestLine, RequestFields, ParsedFields]:
    return parse_request(raw, NAMES, fakes.holds_key)


def answered(raw: bytes) -> tuple[StatusLine, ResponseFields, ParsedFields]:
    return parse_response(raw, NAMES)


def refused(raw: bytes) -> Reason:
    with pytest.raises(Refusal) as error:
        parse_request(raw, NAMES, fakes.holds_key)
    return error.value.reason


# -- the request line


@pytest.mark.parametrize(
    ("start", "target", "minor"),
    [
        (b"GET / HTTP/1.1", b"/", 1),
        (b"GET /a?b=%2e%2e HTTP/1.0", b"/a?b=%2e%2e", 0),
        (b"M-SEARCH /a HTTP/1.1", b"/a", 1),
        (b"OPTIONS * HTTP/1.1", b"*", 1),
        (b"GET http://A.example/x?y HTTP/1.1", b"/x?y", 1),
        (b"GET http://a.example HTTP/1.1", b"/", 1),
    ],
)
def test_a_request_line_is_forwarded_as_http_1_1_in_origin_form(start: bytes, target: bytes, minor: int) -> None:
    line, _, _ = accepted(request(start=start))
    method = start.partition(b" ")[0]
    assert (line.method, line.target, line.minor_version) == (method, target, minor)
    assert line.path == target.partition(b"?")[0]
    assert line.start == b"%b %b HTTP/1.1\r\n" % (method, target)


@pytest.mark.parametrize(
    "start",
    [
        b"", b"GET", b"GET /", b"GET / ", b"GET /a b HTTP/1.1", b"GET  / HTTP/1.1", b"GET /  HTTP/1.1",
        b" GET / HTTP/1.1",
        b"GET / HTTP/1.1 ", b"GET\t/ HTTP/1.1", b"GET /\tHTTP/1.1", b"GET\x0b/ HTTP/1.1", b"GET  HTTP/1.1",
        b"\r\nGET / HTTP/1.1", b"\nGET / HTTP/1.1", b"\xef\xbb\xbfGET / HTTP/1.1", b"\x00GET / HTTP/1.1",
        b"G\x00T / HTTP/1.1", b"CONNECT a.example:80 HTTP/1.1", b"G@T / HTTP/1.1", b"-@ / HTTP/1.1",
        b"CONNECT / HTTP/1.1", b"PRI * HTTP/2.0", b"PRI * HTTP/1.1", b"A" * 33 + b" / HTTP/1.1", b"FOO / HTTP/1.2",
        b"FOO /a/../b HTTP/1.1", b"TRACE /a/../b HTTP/1.1", b"TRACE * HTTP/1.1",
        b"GET / http/1.1", b"GET / HTTP/0.9", b"GET / HTTP/1.2", b"GET / HTTP/2.0", b"GET / HTTP/1", b"GET / HTTP/1.10",
        b"GET / HTTP/01.1", b"GET / HTTP/1.1\x00", b"GET / HTTP /1.1", b"GET / HTTPS/1.1", b"GET / RTSP/1.0",
        b"SOURCE / ICE/1.0", b"GET / HTTP/+1.1", b"GET / HTTP/1,1", b"GET / HTTP/\xb9.1",
        b"GET a.example HTTP/1.1", b"GET a.example/x HTTP/1.1", b"GET * HTTP/1.1", b"GET http://b.example/ HTTP/1.1",
        b"GET http://u@a.example/ HTTP/1.1", b"GET http:///x HTTP/1.1", b"GET ftp://a.example/ HTTP/1.1",
        b"GET /a/../b HTTP/1.1", b"GET /%2e HTTP/1.1", b"GET /a#b HTTP/1.1", b"GET /\xe9 HTTP/1.1",
        b"GET /\x00 HTTP/1.1",
        b"GET /\\ HTTP/1.1", b"GET /\r HTTP/1.1", b"GET /\x7f HTTP/1.1",
    ],
)  # fmt: skip
def test_any_other_request_line_is_refused(start: bytes) -> None:
    assert refused(request(start=start)) is Reason.REQUEST_MALFORMED


@pytest.mark.parametrize(
    "method",
    [b"get", b"Get", b"FOO", b"PRI", b"DESCRIBE", b"TRACK", b"GETX", b"GE", b"-", b"X!#$%&'*+.^_`|~0-9", b"A" * 32],
)
def test_a_method_that_is_not_registered_is_not_implemented_unless_a_route_names_it(method: bytes) -> None:
    raw = request(start=b"%b /a HTTP/1.1" % method)
    assert refused(raw) is Reason.METHOD_NOT_IMPLEMENTED
    line, _, _ = parse_request(raw, NAMES, fakes.holds_key, {method})
    assert line.start == b"%b /a HTTP/1.1\r\n" % method


@pytest.mark.parametrize("method", sorted(KNOWN_METHODS))
def test_every_registered_method_is_forwarded_as_it_came(method: bytes) -> None:
    line, _, parsed = accepted(request(b"Content-Length: 5", start=b"%b /a HTTP/1.1" % method))
    assert (line.method, line.start) == (method, b"%b /a HTTP/1.1\r\n" % method)
    assert parsed.content_length == 5


def test_trace_is_not_allowed() -> None:
    assert refused(request(start=b"TRACE / HTTP/1.1")) is Reason.METHOD_NOT_ALLOWED


@pytest.mark.parametrize("fields", [b"Transfer-Encoding: x", b"Host: b", b"X : y", b"Content-Length: +5"])
@pytest.mark.parametrize("start", [b"FOO / HTTP/1.1", b"TRACE / HTTP/1.1"])
def test_malformed_request_is_refused_as_malformed_whatever_its_method(start: bytes, fields: bytes) -> None:
    assert refused(request(fields, start=start)) is Reason.REQUEST_MALFORMED


# -- Host


@pytest.mark.parametrize(
    "host",
    [b"a", b"a.example:80", b"[::1]:80", b"a:", b"[::1]:", b"  a", b"\ta\t"],
    ids=lambda host: host.decode().strip(),
)
def test_exactly_one_well_formed_host_is_required(host: bytes) -> None:
    _, fields, _ = accepted(request(host=b"hOsT:%b\r\n" % host))
    assert (fields.host, fields.host_block) == (host.strip(), b"X-Forwarded-Host: %b\r\n" % host.strip())


@pytest.mark.parametrize("minor", [0, 1])
@pytest.mark.parametrize(
    "host",
    [
        b"Host:\r\n", b"Host: \r\n", b"Host: a b\r\n", b"Host: a,b\r\n", b"Host: a/b\r\n", b"Host: u@a\r\n",
        b"Host: a::\r\n", b"Host: :\r\n", b"Host: :80\r\n",
        b"Host: a:x\r\n", b"Host: \xe9\r\n", b"Host: [::1\r\n", HOST + HOST, HOST + b"host: b\r\n", HOST + b"Host:\r\n",
        b"Host : a\r\n", b" Host: a\r\n", b"Host: a\r\n .example\r\n",
    ],
)  # fmt: skip
def test_any_other_host_is_refused_in_any_version(host: bytes, minor: int) -> None:
    assert refused(request(start=b"GET / HTTP/1.%d" % minor, host=host)) is Reason.REQUEST_MALFORMED


def test_only_http_1_0_may_come_without_host() -> None:
    _, fields, _ = accepted(request(start=b"GET / HTTP/1.0", host=b""))
    assert (fields.host, fields.host_block) == (None, b"")
    assert refused(request(start=b"GET / HTTP/1.1", host=b"")) is Reason.REQUEST_MALFORMED


# -- fields


@pytest.mark.parametrize(
    "field",
    [
        # Lines that end, begin or continue otherwise.
        b"X: a\nY: b", b"X: a\rY: b", b"X: a\n b", b"X: a\r\n b", b"X: a\r\n\tb", b"X: a\r\r\nY: b", b"\rX: a",
        b" X: a",
        b"\tX: a", b"X: a\r\n\r\nY: b", b"X: a\n\nY: b",
        # Values.
        b"X: a\x00b", b"X: \x00", b"X: a\x01", b"X: a\x0b", b"X: a\x0c", b"X: a\x1b", b"X: a\x7f",
        # Names.
        b"X", b"X a", b"X : a", b"X\t: a", b": a", b":", b"X\x00: a", b"X\x7f: a", b"X\x80: a", b"X\xe9: a",
        b"\xef\xbb\xbfX: a",
        b"X(: a", b'X": a', b"X/: a", b"X[: a", b"X@: a", b"X,Y: a", b"X Y: a",
        b"X!: a", b"X~: a", b"X|: a", b"X*: a", b"X+Y: a", b"X'Y: a", b"X`: a", b"X^Y: a",
        b"X%59: a",
        b"Content_Length: 5", b"Transfer_Encoding: chunked", b"Content.Type: a", b"Content_Encoding: gzip",
        b"Connection: content_length", b"Connection: Transfer.Encoding",
        b"X!Keyproxy!User: u",
        # Repeated.
        b"Content-Type: a\r\nContent-Type: A", b"content-type: a\r\nCONTENT-TYPE: b",
        b"Content-Type: a\r\nContent-Type: a\r\nContent-Type: b", b"Content-Type: a\r\nContent-Type:",
        # Connection options that would make it another message.
        b"Connection: host", b"Connection: close, Content-Length", b"Connection: TRANSFER-ENCODING",
        b"Connection: x\r\nConnection: content-type",
    ],
)  # fmt: skip
def test_fields_that_two_servers_could_read_differently_are_refused(field: bytes) -> None:
    assert refused(request(field)) is Reason.REQUEST_MALFORMED
    assert refused(request(b"A: b\r\n" + field + b"\r\nC: d")) is Reason.REQUEST_MALFORMED


@pytest.mark.parametrize(
    ("fields", "forwarded"),
    [
        (b"X: a", b"X"),
        (b"X:a\r\nY:\r\nZ: \t a: b \t", b"X Y Z"),
        (b"X: \x80\xff \xc3\xa9\t\"\\", b"X"),
        (b"X: 1\r\nx: 2\r\nX: 3", b"X x X"),
        (b"Content-Length: 5\r\nContent-Type: a", b"Content-Length Content-Type"),
        (b"Content-Type: a\r\ncontent-type:  a \r\nX: b\r\nCONTENT-TYPE:a", b"Content-Type X"),
        (b"Transfer-Encoding: chunked", b""),
        (b"Expect: 100-continue\r\nX: a", b"X"),
        (b"Authorization: Api-Key k\r\nx-api-key: k\r\nX: a", b"X"),
        (b"X-Forwarded-For: x\r\nForwarded: x\r\nx-real-ip: x\r\nX-FORWARDED-ANYTHING: x", b""),
        (b"Keep-Alive: x\r\nProxy-Connection: close\r\nTE: trailers\r\nTrailer: x\r\nUpgrade: h2c", b""),
        (b"Proxy-Authorization: x\r\nHTTP2-Settings: x\r\nX: a", b"X"),
        (b"X-Request-Id: r", b""),
        (b"X-Keyproxy-User: u\r\nx_keyproxy_user: u\r\nX_KEYPROXY-Test: u\r\nX-Keyproxy-: u\r\nX_Request_Id: r", b""),
        (b"X-Keyproxy-Act-For: u\r\nX: a", b"X"),
        (b"x_keyproxy.act_for: u\r\nX: a", b"X"),
        (b"Connection: X, y\r\nX: a\r\nY: b\r\nx: c\r\nZ: d", b"Z"),
        (b"X: a\r\nY: b\r\nConnection: close\r\nConnection: x", b"Y"),
        (b"Connection:\r\nX: a", b"X"),
        (b"Connection: ,, X ,\r\nX: a", b""),
        (b"Connection: x-keyproxy-user, x-request-id, authorization\r\nX-Keyproxy-User: u\r\nX: a", b"X"),
        (b"Connection: close, keep-alive, upgrade, te\r\nX: a", b"X"),
    ],
)  # fmt: skip
def test_end_to_end_fields_go_on_and_all_others_end_here(fields: bytes, forwarded: bytes) -> None:
    _, _, parsed = accepted(request(fields))
    names = [line.partition(b":")[0] for line in fields.split(b"\r\n")]
    assert parsed.is_forwarded[0]  # Host
    assert [name for name, goes in zip(names, parsed.is_forwarded[1:], strict=True) if goes] == forwarded.split()


def test_credentials_and_claims_are_set_aside_with_lower_case_names_and_trimmed_values() -> None:
    _, fields, parsed = accepted(
        request(
            b"AUTHORIZATION:\t Api-Key k \t\r\nX-Api-Key: k\r\n"
            b"X-Forwarded-FOR:  x , y \r\nX-Request-Id: r \r\nForwarded: z"
        )
    )
    assert parsed.credentials == [CredentialField(b"authorization", b"Api-Key k"), CredentialField(b"x-api-key", b"k")]
    assert parsed.forwarded == [(b"x-forwarded-for", b"x , y"), (b"forwarded", b"z")]
    assert parsed.request_id == b"r"
    assert not fields.expects_continue


TOKEN = jwt(HEADER)


@pytest.mark.parametrize(
    ("target", "is_ambiguous"),
    [
        (b"/" + TOKEN, False),
        (b"/a?b=" + b"".join(b"%%25%02X" % sign for sign in TOKEN), False),
        (b"/" + TOKEN.replace(b".", b"%2E"), True),
        (b"/" + b"".join(b"%%%02x" % sign for sign in TOKEN), True),
        (b"/../" + TOKEN, True),
        (b"//" + TOKEN, True),
        (b"http://other.example/" + TOKEN, True),
    ],
)
def test_a_token_in_the_url_is_found_also_in_a_target_that_is_ambiguous(target: bytes, is_ambiguous: bool) -> None:
    raw = request(start=b"GET %b HTTP/1.1" % target)
    if is_ambiguous:
        assert refused(raw) is Reason.KEY_IN_URL
    else:
        assert accepted(raw)[0].holds_key
    line = refused_line(raw, fakes.holds_key)
    assert line is not None
    assert line.holds_key or not line.target


ACT_FOR = b"X-Keyproxy-Act-For"


@pytest.mark.parametrize(
    "name", [ACT_FOR, ACT_FOR.lower(), ACT_FOR.upper(), b"X_Keyproxy_Act_For", b"x.keyproxy-act_for"]
)
@pytest.mark.parametrize(
    ("value", "act_for"),
    [(b" u_42", b"u_42"), (b"u_42", b"u_42"), (b"\t u_42 \t", b"u_42"), (b"", b""), (b"  ", b""), (b" u 42", b"u 42"),
     (b" u_42, u_43", b"u_42, u_43"), (b" \xe9\xff", b"\xe9\xff"), (b" " + b"u" * 4000, b"u" * 4000)],
)  # fmt: skip
@pytest.mark.parametrize("start", [b"POST /a HTTP/1.1", b"POST /a HTTP/1.0"])
def test_the_one_act_for_header_is_read_in_any_spelling_and_never_forwarded(
    name: bytes, value: bytes, act_for: bytes, start: bytes
) -> None:
    _, _, parsed = accepted(request(b"%b:%b\r\nX: a" % (name, value), start=start))
    assert (parsed.act_for, parsed.is_forwarded) == (act_for, [True, False, True])


@pytest.mark.parametrize(
    "fields",
    [
        b"X-Keyproxy-Act-For: u\r\nX-Keyproxy-Act-For: u",
        b"X-Keyproxy-Act-For: u\r\nX-Keyproxy-Act-For: v",
        b"X-Keyproxy-Act-For:\r\nX-Keyproxy-Act-For:",
        b"X-Keyproxy-Act-For: u\r\nA: b\r\nx-keyproxy-act-for: u",
        b"X_Keyproxy_Act_For: u\r\nX.Keyproxy.Act.For: u",
        b"X-Keyproxy-Act-For: u\r\nConnection: X-Keyproxy-Act-For",
        b"Connection: close, x_keyproxy.act_FOR\r\nX-Keyproxy-Act-For: u",
        b"Connection: A\r\nA: b\r\nConnection: x-keyproxy-act-for",
        b"Connection: X-Keyproxy-Act-For",
        b"X-Keyproxy-Act-For: u\r\n v",
        b"X-Keyproxy-Act-For:\r\n u",
        b"X-Keyproxy-Act-For: u\x00v",
        b"X-Keyproxy-Act-For: u\x7f",
        b"X-Keyproxy-Act-For : u",
        b"X-Keyproxy-Act-For",
        b"X-Keyproxy-Act!For: u",
    ],
)
def test_an_act_for_header_that_servers_could_read_differently_is_malformed(fields: bytes) -> None:
    assert refused(request(fields)) is Reason.REQUEST_MALFORMED


def test_an_act_for_header_of_an_upstream_is_not_relayed_and_means_nothing() -> None:
    fields = b"X-Keyproxy-Act-For: u\r\nx_keyproxy_act_for: v\r\nConnection: X-Keyproxy-Act-For"
    _, _, parsed = answered(response(fields))
    assert (parsed.act_for, parsed.is_forwarded) == (None, [False, False, False])


@pytest.mark.parametrize(("count", "is_accepted"), [(0, True), (1, True), (253, True), (254, False), (300, False)])
def test_a_head_has_so_many_fields_and_no_more(count: int, is_accepted: bool) -> None:
    raw = request(b"\r\n".join([b"X: a"] * count))  # with Host, one more
    if is_accepted:
        assert len(accepted(raw)[2].is_forwarded) == count + 1
    else:
        assert refused(raw) is Reason.HEADERS_TOO_LARGE
        with pytest.raises(Refusal, check=lambda refusal: refusal.reason is Reason.UPSTREAM_INVALID):
            answered(response(b"\r\n".join([b"X: a"] * (count + 1))))


# -- framing


@pytest.mark.parametrize("value", [b"0", b"5", b" 5 ", b"\t5", b"005", b"9" * 18])
def test_a_content_length_is_up_to_18_digits(value: bytes) -> None:
    for _, fields, parsed in (
        accepted(request(b"Content-Length:" + value)),
        answered(response(b"Content-Length:" + value)),
    ):
        assert (fields.has_content_length, parsed.content_length, fields.is_chunked) == (True, int(value), False)


@pytest.mark.parametrize(
    "field", [b"content-length:5", b"Content-Length: 005", b"Content-Length:\t 5 ", b"CONTENT-LENGTH: 0"]
)
def test_a_content_length_is_forwarded_as_plain_digits(field: bytes) -> None:
    name, _, value = field.partition(b":")
    raw = request(b"X: a\r\n" + field + b"\r\nY: b")
    head = RequestReader(NAMES, fakes.holds_key).read(raw, len(raw) - 4)
    assert head.block == HOST + b"X: a\r\n%b: %d\r\nY: b\r\n" % (name, int(value))
    raw = response(b"X: a\r\n" + field)
    assert ResponseReader(NAMES).read(raw, len(raw) - 4).block == b"X: a\r\n%b: %d\r\n" % (name, int(value))


@pytest.mark.parametrize("value", [b"chunked", b"CHUNKED", b"\tchunked "])
def test_chunked_is_the_only_transfer_coding(value: bytes) -> None:
    for _, fields, parsed in (
        accepted(request(b"Transfer-Encoding:" + value)),
        answered(response(b"Transfer-Encoding:" + value)),
    ):
        assert (fields.is_chunked, fields.has_content_length) == (True, False)
        assert parsed.is_forwarded[-1] is False


@pytest.mark.parametrize(
    "fields",
    [
        *(b"Content-Length:" + value for value in (
            b"", b" ", b" +5", b" -5", b" 0x5", b" 5_0", b" 5.0", b" 5e1", b" 5 5", b" 5,5", b" 5, 5", b" 5;", b' "5"',
            b" \xb2", b" \xd9\xa5", b" " + b"9" * 19, b" " + b"0" * 18 + b"5", b" 5\x00", b" 5\x0b",
        )),
        b"Content-Length: 5\r\nContent-Length: 5", b"Content-Length: 5\r\ncontent-length: 6",
        *(b"Transfer-Encoding:" + value for value in (
            b"", b" identity", b" gzip", b" gzip, chunked", b" chunked, gzip", b" chunked, chunked", b" chunked,",
            b" ,chunked",
            b" xchunked", b" chunkedx", b' "chunked"', b" chunked;q=1", b" chunk", b"\x0bchunked", b" chunked\x00",
            b" chun\tked",
            b"\xa0chunked",
        )),
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\ntransfer-encoding: x",
        b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked", b"Transfer-Encoding : chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5", b"Content-Length: 0\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding\x00: chunked", b"Transfer-Encoding:\r\n chunked", b"Transfer-Encoding: chunked\nX: a",
        b"Connection: content-length\r\nContent-Length: 5",
        b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked",
    ],
)  # fmt: skip
def test_any_other_framing_is_refused_in_requests_and_responses(fields: bytes) -> None:
    assert refused(request(fields)) is Reason.REQUEST_MALFORMED
    with pytest.raises(Refusal) as error:
        answered(response(fields))
    assert error.value.reason is Reason.UPSTREAM_INVALID


CHUNKED = b"Connection: keep-alive\r\nTransfer-Encoding: chunked"


def test_an_http_1_0_request_has_no_chunks() -> None:
    assert refused(request(CHUNKED, start=b"POST / HTTP/1.0")) is Reason.REQUEST_MALFORMED


def test_a_chunked_http_1_0_response_is_refused_or_the_last_of_its_connection() -> None:
    """RFC 9112 section 6.1: its framing is faulty, so nothing after it can be trusted."""
    try:
        _, fields, _ = answered(response(CHUNKED, start=b"HTTP/1.0 200 OK"))
    except Refusal as refusal:
        if refusal.reason is not Reason.UPSTREAM_INVALID:
            raise
    else:
        assert not fields.keeps_alive


@pytest.mark.parametrize(
    ("minor", "connection", "keeps_alive"),
    [
        (1, b"", True),
        (1, b"keep-alive", True),
        (1, b"CLOSE", False),
        (1, b"x, close", False),
        (1, b"keep-alive, close", False),
        (1, b"x\r\nConnection: close", False),
        (1, b"closed", True),
        (1, b'"close"', True),
        (0, b"", False),
        (0, b"Keep-Alive", True),
        (0, b"x,keep-alive", True),
        (0, b"keep-alive, close", False),
        (0, b"close", False),
    ],
)
def test_a_connection_is_kept_according_to_its_version_and_options(
    minor: int, connection: bytes, keeps_alive: bool
) -> None:
    field = b"Connection: " + connection
    assert accepted(request(field, start=b"GET / HTTP/1.%d" % minor))[1].keeps_alive is keeps_alive
    assert answered(response(field, start=b"HTTP/1.%d 200 OK" % minor))[1].keeps_alive is keeps_alive


@pytest.mark.parametrize(("minor", "expects"), [(1, True), (0, False)])
def test_only_an_http_1_1_client_waits_for_100(minor: int, expects: bool) -> None:
    raw = request(b"Expect: 100-Continue", start=b"POST / HTTP/1.%d" % minor)
    assert accepted(raw)[1].expects_continue is expects


@pytest.mark.parametrize(
    "expect", [b"200-ok", b"100-continue, x", b"100-continue\r\nExpect: x", b"y 100-continue", b"100-continue=1"]
)
@pytest.mark.parametrize("minor", [0, 1])
def test_an_expectation_that_cannot_be_met_fails(expect: bytes, minor: int) -> None:
    assert refused(request(b"Expect: " + expect, start=b"POST / HTTP/1.%d" % minor)) is Reason.EXPECTATION_FAILED
    assert refused(request(b"X : y\r\nExpect: " + expect)) is Reason.REQUEST_MALFORMED


@pytest.mark.parametrize(("expect", "expects"), [(b"", False), (b" , ", False), (b"100-continue,", True)])
def test_an_empty_expectation_is_none(expect: bytes, expects: bool) -> None:
    _, fields, parsed = accepted(request(b"Expect: " + expect))
    assert fields.expects_continue is expects
    assert parsed.is_forwarded[1:] == [False]


KEY_FIELD, VERSION_FIELD = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13"
UPGRADE = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket"


def handshake(*lines: bytes, start: bytes = b"GET /ws HTTP/1.1") -> bytes:
    return request(b"\r\n".join(lines), start=start)


@pytest.mark.parametrize("upgrade", [b"websocket", b"WebSocket", b"h2c, websocket", b"h2c\r\nUpgrade: websocket"])
def test_a_complete_websocket_handshake_opens_a_tunnel(upgrade: bytes) -> None:
    _, fields, _ = accepted(handshake(KEY_FIELD, VERSION_FIELD, b"Connection: upgrade\r\nUpgrade: " + upgrade))
    assert fields.opens_tunnel
    assert fields.head_end == b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "lacks"),
    [
        (handshake(VERSION_FIELD, UPGRADE), "Sec-WebSocket-Key"),
        (handshake(b"Sec-WebSocket-Key:", VERSION_FIELD, UPGRADE), "Sec-WebSocket-Key"),
        (handshake(KEY_FIELD, KEY_FIELD, VERSION_FIELD, UPGRADE), "Sec-WebSocket-Key"),
        (handshake(KEY_FIELD, UPGRADE), "Sec-WebSocket-Version"),
        (handshake(KEY_FIELD, b"Sec-WebSocket-Version: 8", UPGRADE), "Sec-WebSocket-Version"),
        (handshake(KEY_FIELD, VERSION_FIELD, b"Sec-WebSocket-Version: 8", UPGRADE), "Sec-WebSocket-Version"),
        (handshake(KEY_FIELD, VERSION_FIELD, b"Upgrade: websocket"), "Connection option"),
        (handshake(KEY_FIELD, VERSION_FIELD, UPGRADE, start=b"POST /ws HTTP/1.1"), "GET"),
        (handshake(KEY_FIELD, VERSION_FIELD, UPGRADE, b"Content-Length: 0"), "without a body"),
        (handshake(KEY_FIELD, VERSION_FIELD, UPGRADE, b"Transfer-Encoding: chunked"), "without a body"),
    ],
)
def test_an_incomplete_websocket_handshake_is_refused_by_name(raw: bytes, lacks: str) -> None:
    with pytest.raises(Refusal) as error:
        accepted(raw)
    assert error.value.reason is Reason.REQUEST_MALFORMED
    assert lacks in error.value.detail
    assert lacks in error.value.caller_text


@pytest.mark.parametrize(
    "raw",
    [
        handshake(b"Upgrade: websocket", start=b"GET /ws HTTP/1.0"),  # RFC 9110 section 7.8
        handshake(b"Connection: Upgrade", KEY_FIELD, VERSION_FIELD),
        handshake(b"Connection: Upgrade\r\nUpgrade: h2c", KEY_FIELD, VERSION_FIELD),
        handshake(b"Connection: Upgrade\r\nUpgrade: xwebsocket"),
    ],
)
def test_incomplete_upgrade_is_parsed_as_a_plain_request(raw: bytes) -> None:
    assert not accepted(raw)[1].opens_tunnel


def test_each_handshake_is_judged_by_its_own_method_and_fields() -> None:
    reader = RequestReader(NAMES, fakes.holds_key)
    whole = handshake(KEY_FIELD, VERSION_FIELD, UPGRADE)
    for _ in range(LEARNT_AFTER + 2):
        assert reader.read(whole, len(whole) - 4).fields.opens_tunnel
    for changed in (
        whole.replace(b"GET", b"POST"),
        whole.replace(KEY_FIELD, b"Sec-WebSocket-Key: "),
        whole.replace(b"13", b"8"),
    ):
        with pytest.raises(Refusal):
            reader.read(changed, len(changed) - 4)


@pytest.mark.parametrize(
    ("method", "status", "is_bodiless"),
    [
        (b"GET", 100, True), (b"GET", 199, True), (b"GET", 200, False), (b"GET", 204, True), (b"GET", 205, False),
        (b"GET", 304, True), (b"GET", 404, False), (b"HEAD", 200, True), (b"HEAD", 404, True), (b"POST", 200, False),
    ],
)  # fmt: skip
def test_a_bodiless_response_is_known_by_method_and_status(method: bytes, status: int, is_bodiless: bool) -> None:
    assert has_no_body(method, StatusLine(status, 1, b"")) is is_bodiless


# -- responses


@pytest.mark.parametrize(
    ("start", "status", "minor", "sent"),
    [
        (b"HTTP/1.1 200 OK", 200, 1, b"HTTP/1.1 200 OK\r\n"),
        (b"HTTP/1.0 404 Not Found ", 404, 0, b"HTTP/1.1 404 Not Found\r\n"),
        (b"HTTP/1.1 599 ", 599, 1, b"HTTP/1.1 599 \r\n"),
        (b"HTTP/1.1 200", 200, 1, b"HTTP/1.1 200 \r\n"),
        (b"HTTP/1.1 100 Continue", 100, 1, b"HTTP/1.1 100 Continue\r\n"),
        (b"HTTP/1.1 200 \xc3\xa9\t!", 200, 1, b"HTTP/1.1 200 \xc3\xa9\t!\r\n"),
    ],
)
def test_a_status_line_is_relayed_as_http_1_1(start: bytes, status: int, minor: int, sent: bytes) -> None:
    line, _, _ = answered(response(start=start))
    assert (line.status, line.minor_version, line.start) == (status, minor, sent)


@pytest.mark.parametrize(
    "start",
    [
        b"", b"200 OK", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 20 OK", b"HTTP/1.1 099 X", b"HTTP/1.1 600 X",
        b"HTTP/1.1 0200 OK",
        b"HTTP/1.1 2000 OK", b"HTTP/1.1 +20 OK", b"HTTP/1.1 2x0 OK", b"HTTP/1.1  200 OK", b"HTTP/1.1\t200 OK",
        b"HTTP/1.1 200OK", b"HTTP/1.1 200\tOK", b" HTTP/1.1 200 OK", b"\r\nHTTP/1.1 200 OK", b"http/1.1 200 OK",
        b"HTTP/0.9 200 OK", b"HTTP/1.2 200 OK", b"HTTP/2 200 OK", b"HTTP/2.0 200 OK", b"RTSP/1.0 200 OK", b"ICY 200 OK",
        b"GET / HTTP/1.1", b"HTTP/1.1 200 O\rK", b"HTTP/1.1 200 O\nK",
        b"HTTP/1.1 200 O\x00K", b"HTTP/1.1 200 O\x1b[2JK", b"HTTP/1.1 200 O\x7fK",
    ],
)  # fmt: skip
def test_any_other_status_line_is_refused(start: bytes) -> None:
    with pytest.raises(Refusal) as error:
        answered(response(start=start))
    assert error.value.reason is Reason.UPSTREAM_INVALID


@pytest.mark.parametrize(
    ("fields", "forwarded"),
    [
        (b"X: a\r\nX_Y: b\r\nX.Y: c\r\nServer: s", b"X X_Y X.Y Server"),
        (b"Set-Cookie: a\r\nSet-Cookie: b\r\nAge: 1", b"Set-Cookie Set-Cookie Age"),
        (b"Content-Type: a\r\nContent-Type: b", b"Content-Type Content-Type"),
        (b"WWW-Authenticate: x\r\nAuthorization: x\r\nHost: h", b"WWW-Authenticate Authorization Host"),
        (b"X-Forwarded-For: x\r\nX-Api-Key: x\r\nExpect: x", b"X-Forwarded-For X-Api-Key Expect"),
        (b"Content-Length: 5", b"Content-Length"),
        (b"Transfer-Encoding: chunked\r\nTrailer: x\r\nKeep-Alive: x\r\nUpgrade: h2c\r\nProxy-Authenticate: x", b""),
        (b"X-Request-Id: r\r\nX-Keyproxy-User: u\r\nx_keyproxy_user: u", b""),
        (b"Connection: X_y, close\r\nx_Y: a\r\nZ: b", b"Z"),
    ],
)  # fmt: skip
def test_a_response_may_have_any_valid_field_name(fields: bytes, forwarded: bytes) -> None:
    _, _, parsed = answered(response(fields))
    names = [line.partition(b":")[0] for line in fields.split(b"\r\n")]
    assert [name for name, goes in zip(names, parsed.is_forwarded, strict=True) if goes] == forwarded.split()


@pytest.mark.parametrize(
    "field",
    [b"X: a\nY: b", b"X: a\r\n b", b"X : a", b": a", b"X", b"X: \x00", b"X\xe9: a", b"Connection: content-length"],
)
def test_malformed_fields_of_an_upstream_are_refused(field: bytes) -> None:
    with pytest.raises(Refusal) as error:
        answered(response(field))
    assert error.value.reason is Reason.UPSTREAM_INVALID


# -- the beginning of a head


@pytest.mark.parametrize(
    "beginning",
    [
        b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost: a\n", b"g@t /", b"GET / HTTP/3.0\r",
        b" ",
        b"\x00", b"GET / HTTP/1.1\r\nX : a", b"GET / HTTP/1.1\r\n X: a", b"SSH-2.0-x\r\n",
    ],
)  # fmt: skip
def test_bytes_that_cannot_begin_a_request_are_refused_without_waiting_for_more(beginning: bytes) -> None:
    with pytest.raises(Refusal) as error:
        check_beginning(beginning)
    assert error.value.reason is Reason.REQUEST_MALFORMED


@pytest.mark.parametrize(
    "beginning", [b"X", b"GETX", b"get", b"get /", b"FOO / HTTP/1.1\r\n", b"hello", b"0", b"\rX", b"GET\t"]
)
def test_bytes_after_a_request_must_begin_with_a_known_method(beginning: bytes) -> None:
    with pytest.raises(Refusal) as error:
        check_beginning(beginning, follows=True)
    assert error.value.reason is Reason.REQUEST_MALFORMED


@pytest.mark.parametrize(
    "beginning", [b"", b"\r", b"\rG", b"G", b"GET", b"GET ", b"GET / HTTP/1.1\r\nHost", b"TRACE /", b"QUERY /"]
)
def test_the_beginning_of_a_request_may_follow_a_request(beginning: bytes) -> None:
    check_beginning(beginning, follows=True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"Content-Length: 5\r\n\r\na\r\nb",
        b'Content-Length: 12\r\n\r\n{\n "a": 1\n}\n',
        b"Content-Length: 4\r\n\r\n\x00\r\n\n",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n0\r\n\r\n",
        b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    ],
)
def test_no_prefix_of_a_well_formed_request_is_refused(body: bytes) -> None:
    whole = b"POST /a?b HTTP/1.1\r\nHost: a\r\nX:\r\n" + body
    for end in range(1, len(whole) + 1):
        check_beginning(whole[:end])


@given(header_strategies.similar_heads())
def test_every_accepted_head_is_made_of_lines_that_every_server_reads_alike(heads: list[bytes]) -> None:
    for raw in heads:
        try:
            line, fields, parsed = accepted(raw)
        except Refusal:
            continue
        for end in range(1, len(raw), 7):
            check_beginning(raw[:end])
        lines = raw[:-4].split(b"\r\n")[1:]
        names = [re.fullmatch(rb"([A-Za-z0-9._-]+):[\t \x21-\x7e\x80-\xff]*", one) for one in lines]
        assert all(names)
        forwarded = [
            one.partition(b":")[0].lower() for one, goes in zip(lines, parsed.is_forwarded, strict=True) if goes
        ]
        folded = [re.sub(rb"[_.]", b"-", name) for name in forwarded]
        assert not {b"connection", b"transfer-encoding", b"authorization", b"x-api-key", b"expect"} & set(folded)
        assert not [name for name in folded if name.startswith((b"x-keyproxy-", b"x-forwarded-"))]
        # What this proxy acts on has one spelling.
        acted_on = {b"host", b"content-length", b"content-type", b"content-encoding"}
        assert [name for name in folded if name in acted_on] == [name for name in forwarded if name in acted_on]
        assert forwarded.count(b"host") == (fields.host is not None)
        assert forwarded.count(b"content-length") == fields.has_content_length
        assert fields.has_content_length + fields.is_chunked <= 1
        assert re.fullmatch(rb"[A-Z-]+ (/[!-~]*|\*) HTTP/1\.1\r\n", line.start)


def test_thousands_of_connection_options_are_not_judged_one_by_one() -> None:
    names = FieldNames()
    options = b",".join(b"x%d" % number for number in range(5_000))
    raw = b"GET / HTTP/1.1\r\nHost: h\r\nX7: a\r\nX-Kept: b\r\nConnection: %b\r\n\r\n" % options
    _, _, parsed = parse_request(raw, names, lambda _target: False)
    assert parsed.is_forwarded == [True, False, True, False]
    assert set(names._remembered) == {b"Host", b"X7", b"X-Kept", b"Connection"}


@pytest.mark.parametrize(
    ("line", "digests"),
    [
        (b"Content-Digest: sha-256=:x:", True), (b"digest:x", True), (b"X-AMZ-Content-SHA256: x", True),
        (b"A: digest: x", False), (b"Want-Digest: x", False), (b"Digests: x", False),
    ],
)  # fmt: skip
def test_a_digest_of_the_body_is_found_in_the_headers(line: bytes, digests: bool) -> None:
    """Also in heads that are recognised by their shape."""
    reader = RequestReader(FieldNames(), lambda _: False)
    for number in range(LEARNT_AFTER + 2):
        raw = b"POST / HTTP/1.1\r\nHost: p\r\n%b\r\nX-Request-Id: %d\r\n\r\n" % (line, number)
        assert reader.read(raw, len(raw) - 4).fields.digests_body is digests
