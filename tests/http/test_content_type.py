"""A Content-Type that servers could take for another type or charset is recognised."""

from __future__ import annotations

import pytest

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
