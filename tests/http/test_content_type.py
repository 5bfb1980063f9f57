"""A Content-Type that servers could take for another type or charset is recognised."""

from __future__ import annotations

import re
from email.message import Message

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.http.content_type import is_unambiguous


@pytest.mark.parametrize(
    "value",
    [
        b"", b"application/json", b"application/vnd.api+json", b"text/plain", b"application/json;charset=utf-8",
        b"application/json; charset=utf-8", b'application/json; charset="utf-8"', b"application/json; charset=utf8;",
        b"application/json; charset=us-ascii; version=1", b'application/json; profile="a;b"', b"application/json ;v=1",
        b"multipart/form-data; boundary=b", b"multipart/form-data; boundary=b; charset=utf-8",
        b"multipart/form-data; boundary=multipart", b"application/x-www-form-urlencoded; charset=utf-8",
    ],
)  # fmt: skip
def test_a_type_that_all_servers_read_alike_is_unambiguous(value: bytes) -> None:
    assert is_unambiguous(value)


@pytest.mark.parametrize(
    "value",
    [
        b"application/json; charset=utf-7", b"application/json; charset=utf-16", b'application/json; charset="utf-7"',
        b"application/json; charset='utf-7'", b"application/json; charset=utf-8; charset=utf-7",
        b"application/json; charset*=utf-7", b"application/json; charset*0=utf; charset*1=-7",
        b"application/json; charset = utf-7", b"application/json; charset=utf-8,utf-7", b"application/json; charset=",
        b"application/json; charset", b"application/json; charset=utf-8x", b'application/json; x="charset=utf-7"',
        b"application/x-www-form-urlencoded; charset=cp037", b"application/json; x=urlencoded",
        b"application/json; x=multipart/form-data; boundary=b", b"multipart/mixed; boundary=b",
        b"multipart/related; boundary=b", b"text/x-www-form-urlencoded", b"application/x-www-form-urlencoded2",
        b"application/json, text/plain", b"text/plain, application/x+json", b"json", b"application/json/x", b"/json",
        b"; charset=utf-8", b"application/ json",
    ],
)  # fmt: skip
def test_a_type_that_some_server_takes_for_another_type_or_charset_is_ambiguous(value: bytes) -> None:
    assert not is_unambiguous(value)


PIECES = st.sampled_from(
    [";", "; ", " ", "=", '"', "'", ",", "*", "*0", "\\", "charset", "CHARSET", "charset=utf-8", "charset=utf-7", "utf-8",
     "utf-7", "boundary=b", "x", "x=y", 'x="', "multipart/form-data", "application/x-www-form-urlencoded", "text/plain"]
)  # fmt: skip
FIRST = st.sampled_from(["application/json", "a/b+json", "multipart/form-data; boundary=b", "text/plain", "", "x"])


def charsets(value: str) -> set[str]:
    """The charsets that lenient parsers find: the standard library's, and expressions that search the whole value."""
    message = Message()
    message["Content-Type"] = value
    found = {message.get_content_charset() or ""}
    for expression in (
        r"charset\s*=\s*\"?([^\s;\"]*)",
        r".*charset=['\"]?([^\s;\"']*)",
        r"charset[*0-9]*=(?:\w*'\w*')?([^;]*)",
    ):
        match = re.search(expression, value, re.IGNORECASE)
        found.add(match[1].strip('" ').lower() if match else "")
    return found


@given(first=FIRST, rest=st.lists(PIECES, max_size=6))
def test_no_parser_finds_another_charset_or_form_in_an_unambiguous_type(first: str, rest: list[str]) -> None:
    value = first + "".join(rest)
    if not is_unambiguous(value.lower().encode()):
        return
    assert charsets(value) <= {"", "utf-8", "utf8", "us-ascii", "ascii"}
    if value.lower().partition(";")[0].strip() != "multipart/form-data":
        assert "multipart" not in value.lower()


def test_the_parsers_find_what_is_refused() -> None:
    assert "utf-7" in charsets("application/json; charset=utf-7")
    assert "utf-7" in charsets("application/json; charset*=us-ascii'en'utf-7")
