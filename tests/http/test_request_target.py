"""Request targets and Hosts: only unambiguous ones are forwarded."""

from __future__ import annotations

import re
from itertools import product
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyproxy.http import request_target
from keyproxy.reasons import Reason, Refusal


def accepts(sent: bytes, *, method: bytes = b"GET", host: bytes | None = b"a.example") -> bool:
    try:
        request_target.judge(method, sent, host)
    except Refusal as refusal:
        if refusal.reason is not Reason.REQUEST_MALFORMED:
            raise
        return False
    return True


def accepted(forms: list[bytes], part: bytes) -> list[bytes]:
    """The accepted ones of the targets with this part."""
    return [form % part for form in forms if accepts(form % part)]


@pytest.mark.parametrize(
    "sent",
    [
        b"/", b"/v1/ai/jobs", b"/a//b", b"/a/", b"/.well-known/x", b"/a.b/c..d", b"/..a", b"/a..", b"/...", b"/a/.b",
        b"/%61", b"/%20", b"/a%20b%C3%A9", b"/a;b=c", b"/a;x=../b", b"/%25", b"/%2525", b"/~a!$&'()*+,=:@_-",
        b"/?", b"/a?b=c&d", b"/a?x=/../y", b"/a?x=%2F%2e%5c%00", b"/a?%", b"/a?..", b"/a??", b'/a"b', b"/{a}",
    ],
)  # fmt: skip
def test_a_plain_target_is_forwarded_byte_for_byte(sent: bytes) -> None:
    assert request_target.judge(b"GET", sent, b"a.example")[:2] == (sent, sent.partition(b"?")[0])


@pytest.mark.parametrize(
    ("sent", "host", "forwarded"),
    [
        (b"http://a.example/p", b"a.example", b"/p"),
        (b"HTTP://A.Example/p?q", b"a.EXAMPLE", b"/p?q"),
        (b"https://a.example/p", b"a.example", b"/p"),
        (b"http://a.example", b"a.example", b"/"),
        (b"http://a.example?q", b"a.example", b"/?q"),
        (b"http://a.example:80/", b"a.example:80", b"/"),
        (b"http://[::1]:80/", b"[::1]:80", b"/"),
    ],
)
def test_an_absolute_target_that_agrees_with_host_is_forwarded_in_origin_form(
    sent: bytes, host: bytes | None, forwarded: bytes
) -> None:
    assert request_target.judge(b"GET", sent, host)[:2] == (forwarded, forwarded.partition(b"?")[0])


@pytest.mark.parametrize(
    ("sent", "host"),
    [
        (b"http://b.example/", b"a.example"),
        (b"http://a.example:80/", b"a.example"),
        (b"http://a.example/", b"a.example:80"),
        (b"http://a.example./", b"a.example"),
        (b"http://u@a.example/", b"a.example"),
        (b"http://u:p@a.example/", b"a.example"),
        (b"http:///p", b"a.example"),
        (b"http://?q", b"a.example"),
        (b"http://a.example:/", b"a.example"),
        (b"http://a.example/../b", b"a.example"),
        (b"http://a.example/%2e", b"a.example"),
        (b"http:/a.example/", b"a.example"),
        (b"http:a.example", b"a.example"),
        (b"ftp://a.example/", b"a.example"),
        (b"a.example:80", b"a.example:80"),
        (b"a.example", b"a.example"),
        (b"", b"a.example"),
        (b"?q", b"a.example"),
    ],
)
def test_any_other_form_or_a_disagreeing_host_is_refused(sent: bytes, host: bytes) -> None:
    assert not accepts(sent, host=host)


@pytest.mark.parametrize(("method", "is_accepted"), [(b"OPTIONS", True), (b"GET", False), (b"POST", False)])
def test_asterisk_is_valid_only_for_options(method: bytes, is_accepted: bool) -> None:
    assert accepts(b"*", method=method) is is_accepted


@pytest.mark.parametrize("byte", [*range(0x21), 0x7F, 0x80, 0xC3, 0xFF, ord("\\"), ord("#")])
def test_byte_that_is_invalid_in_a_target_is_refused_anywhere(byte: int) -> None:
    assert not accepted([b"/a%bb", b"/a?b%b", b"/%b", b"%b/a", b"*%b"], bytes([byte]))


@pytest.mark.parametrize(
    "segment",
    [
        b".", b"..", b"%2e", b"%2E%2e", b".%2e", b"%2e.", b"a%2fb", b"a%2Fb", b"a%5cb", b"%5C", b"%00", b"%0d%0a",
        b"%1f", b"%7f", b"%c0%af", b"%C0%AE", b"%c1%9c", b"%252e", b"%252F", b"%255c", b"%2500", b"..;", b".;x=1",
        b"..;a;b", b"%", b"%4", b"%g0", b"%u002e", b"%%32e",
        # A second decoding, whatever the spelling of the first.
        b"%25%32%65", b"%252%65", b"%25%32e", b"%25%32f", b"%25%35c", b"%25%30%30",
        # Cutting off a parameter after decoding.
        b"..%3b", b".%3Bx", b"..%3bx=1",
        # Overlong in three and four bytes.
        b"%e0%80%af", b"%e0%80%ae", b"%f0%80%80%af",
    ],
)  # fmt: skip
def test_a_path_that_another_server_may_read_differently_is_refused(segment: bytes) -> None:
    assert not accepted([b"/%b", b"/a/%b", b"/%b/b", b"/a/%b/b", b"/%b?q"], segment)


@pytest.mark.parametrize("sent", [b"//b.example/admin", b"//", b"http://a.example//b.example/admin"])
def test_a_target_that_could_name_another_host_is_refused(sent: bytes) -> None:
    """`//b/admin` is host b and path /admin if it is resolved as a reference, RFC 3986 section 4.2."""
    assert not accepts(sent)


@pytest.mark.parametrize(
    ("sent", "decoded"),
    [
        (b"/a/b", b"/a/b"),
        (b"*", b"*"),
        (b"/a?b=%41", b"/a?b=%41"),
        (b"/%61%?%41", None),
        (b"/%61?%41", b"/a?%41"),
        (b"/%2561", b"/a"),
        (b"/%25%36%31", b"/a"),
        (b"/%25%zz", None),
        (b"/%25zz", b"/%zz"),
        (b"/%252561", b"/a"),
        (b"/%25252561?%61", b"/%25252561?%61"),
        (b"http://a.example/%61?%61", b"/a?%61"),
    ],
)
def test_the_path_is_decoded_completely_or_not_at_all(sent: bytes, decoded: bytes | None) -> None:
    if decoded is None:
        assert not accepts(sent)
    else:
        assert request_target.judge(b"OPTIONS", sent, b"a.example").decoded == decoded


def cut(path: bytes) -> bytes:
    return b"/".join(segment.partition(b";")[0] for segment in path.split(b"/"))


@given(
    st.lists(
        st.sampled_from(
            [
                b"/",
                b".",
                b"..",
                b"%",
                b";",
                b"2",
                b"25",
                b"e",
                b"f",
                b"c",
                b"3b",
                b"00",
                b"%2e",
                b"%2f",
                b"%25",
                b"%3b",
                b"%32",
                b"%65",
                b"x",
            ]
        ),
        max_size=8,
    ).map(b"".join)
)
@example(b"/%25%32%65%25%32%65/b")
@example(b"/..%3b/b")
@settings(max_examples=500)
def test_no_reading_of_an_accepted_path_leaves_its_segments(tail: bytes) -> None:
    path = b"/a" + tail
    if not accepts(path):
        return
    for decodings, cuts_first, cuts_last in product(range(3), [False, True], [False, True]):
        reading = cut(path) if cuts_first else path
        for _ in range(decodings):
            reading = unquote_to_bytes(reading)
        reading = cut(reading) if cuts_last else reading
        assert not {b".", b".."} & set(reading.split(b"/"))
        assert reading.count(b"/") == path.count(b"/")
        assert b"\\" not in reading
        assert b"\x00" not in reading


@pytest.mark.parametrize(
    "host",
    [
        b"a", b"a.example", b"A-1.example", b"a_b", b"a.example:1", b"a:65535", b"a:", b"[::1]:", b"127.0.0.1:80",
        b"[::1]", b"[::ffff:1.2.3.4]:80", b"a" * 253,
    ],
)  # fmt: skip
def test_a_host_is_a_name_or_address_with_a_port_or_without(host: bytes) -> None:
    request_target.check_host(host)


@pytest.mark.parametrize(
    "host",
    [
        b"", b" ", b"a b", b"a,b", b"a/b", b"a?b", b"a#b", b"a\\b", b"a@b", b"a::", b":", b":80", b"a:x", b"a:-1",
        b"a:+1", b"a:000001", b"a:80:80", b"::1", b"[::1", b"[]", b"[::1]a", b"[a%25b]", b"[::1]::", b"a%00",
        b"a\x00", b"\xc3\xa9",
        b"a\n", b"'", b"a" * 254,
    ],
)  # fmt: skip
def test_any_other_host_is_refused(host: bytes) -> None:
    with pytest.raises(Refusal):
        request_target.check_host(host)


@given(st.text(alphabet="/.a_%?;~*#\\ \x00\xe9", max_size=12).map(lambda text: text.encode("latin-1")))
def test_a_plain_target_is_valid_in_every_position_and_decodes_to_itself(target: bytes) -> None:
    """Such a target is forwarded without any other check."""
    if request_target.plainness(target) == request_target.NOT_PLAIN:
        return
    assert not any(mark in target for mark in (b"%", b";", b"?", b"#", b"\\", b" ", b"\x00", b"\xe9", b"/."))
    assert target.startswith(b"/")
    assert not target.startswith(b"//")
    assert not re.search(rb"[^!-~]", target)
    # With a query it takes the way of all others.
    query = b"?a"
    assert request_target.judge(b"GET", target + query, b"a") == (target + query, target, target + query)
    assert request_target.judge(b"GET", target, b"a") == (target, target, target)
