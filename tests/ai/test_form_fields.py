"""Multipart forms are read strictly: what two parsers could read differently is refused."""

from __future__ import annotations

import time

import pytest

from keyproxy.ai.access.counted_names import CountedNames
from keyproxy.ai.access.form_fields import PARTS_MAX, FormReading
from keyproxy.reasons import Reason, Refusal

NAMES = CountedNames(["model", "context_window_fallbacks"])
TYPE = b"multipart/form-data; boundary=b"
END = b"--b--\r\n"


def part(head: bytes = b'form-data; name="model"', value: bytes = b"small", *more: bytes) -> bytes:
    lines = b"".join(b"%b\r\n" % line for line in more)
    return b"--b\r\nContent-Disposition: %b\r\n%b\r\n%b\r\n" % (head, lines, value)


def form_fields(content: bytes, content_type: bytes, names: CountedNames) -> dict[str, str]:
    reading = FormReading(content, content_type, names)
    while not reading.advance():
        pass
    return reading.fields


@pytest.mark.parametrize(
    ("body", "content_type", "found"),
    [
        (part() + END, TYPE, {"model": "small"}), (part() + b"--b--", TYPE, {"model": "small"}),
        (part(b"form-data; name=model") + END, TYPE, {"model": "small"}),
        (part(b'form-data; name="x"') + END, TYPE, {}), (part(value=b"") + END, TYPE, {"model": ""}),
        (part(value="é".encode()) + END, TYPE, {"model": "é"}),
        (part(value=b"a\r\nb\n") + END, TYPE, {"model": "a\r\nb\n"}),
        (part(b'form-data; name="f"; filename="a.wav"', b"\x00\xff\n\r") + part() + END, TYPE, {"model": "small"}),
        (part(b'form-data; name="f"; filename*=utf-8\'\'a') + END, TYPE, {}),
        (part(b'form-data; name="it\'s"; filename="it\'s.txt"; filename*=utf-8\'en\'it%27s.txt') + END, TYPE, {}),
        (part() + END, b"multipart/form-data; boundary=b; x=y", {"model": "small"}),
        (part() + END, b'multipart/form-data; charset=utf-8; boundary="b"', {"model": "small"}),
        (part(b'form-data; name="model"', b"x", b"Content-Type: text/plain; charset=UTF-8") + END, TYPE, {"model": "x"}),
        (part(b'form-data; name="model\xc3\xa9"') + END, TYPE, {}),
        (part(b'form-data; name="x"') * PARTS_MAX + END, TYPE, {}),
    ],
)  # fmt: skip
def test_counting_fields_of_a_form_are_read(body: bytes, content_type: bytes, found: dict[str, str]) -> None:
    assert form_fields(body, content_type, NAMES) == found


REFUSED = {
    "a counting field twice": part() * 2 + END,
    "another case": part(b'form-data; name="Model"') + END,
    "a bracket": part(b'form-data; name="model[]"') + END,
    "a NUL": part(b'form-data; name="model\0"') + END,
    "a space": part(b'form-data; name=" model"') + END,
    "percent-encoded": part(b'form-data; name="mod%65l"') + END,
    "an encoded word": part(b'form-data; name="=?utf-8?q?x?="') + END,
    "a backslash": part(b'form-data; name="mo\\del"') + END,
    "a backslash in a file name": part(b'form-data; filename="a\\"; name="x"') + END,
    "an extended name": part(b"form-data; name=\"x\"; name*=utf-8''model") + END,
    "an extended name alone": part(b"form-data; name*=utf-8''model") + END,
    "a continued name": part(b'form-data; name*0="mod"; name*1="el"') + END,
    "single quotes": part(b"form-data; name='model'") + END,
    "single quotes around a separator": part(b"""form-data; x='; y="'; name=model; z='"; name=other""") + END,
    "a name in another parameter": part(b'form-data; name="x"; x="; name=model"') + END,
    "a name in a file name": part(b'form-data; name="x"; filename="a; NAME*=model"') + END,
    "a name in the name": part(b'form-data; name="x; name=model"') + END,
    "a single quote": part(b"form-data; name=it's") + END,
    "PHP's spelling": part(b'form-data; name="context.window fallbacks"') + END,
    "brackets around it": part(b'form-data; name="[model]"') + END,
    "a closing bracket": part(b'form-data; name="model]"') + END,
    "a parameter twice": part(b'form-data; name="x"; name="model"') + END,
    "no name": part(b"form-data") + END,
    "another disposition": part(b'attachment; name="model"') + END,
    "a file name": part(b'form-data; name="model"; filename="m"') + END,
    "an extended file name": part(b"form-data; name=\"model\"; filename*=utf-8''m") + END,
    "a transfer encoding": part(b'form-data; name="model"', b"c21hbGw=", b"Content-Transfer-Encoding: base64") + END,
    "another charset": part(b'form-data; name="model"', b"x", b"Content-Type: text/plain; charset=utf-16") + END,
    "invalid UTF-8": part(value=b"\xff") + END,
    "_charset_": part(b'form-data; name="_charset_"', b"utf-16") + part() + END,
    "a header twice": part(b'form-data; name="x"', b"v", b'Content-Disposition: form-data; name="model"') + END,
    "a continued header": part(b'form-data;\r\n name="model"') + END,
    "a preamble": b"x\r\n" + part() + END,
    "an empty line before": b"\r\n" + part() + END,
    "an epilogue": part() + END + b"x",
    "no end": part(),
    "nothing": END,
    "a bare LF before a boundary": part(value=b"a\n--b\nContent-Disposition: x") + END,
    "a bare LF after a boundary": part().replace(b"--b\r\n", b"--b\n") + END,
    "a bare LF in headers": part().replace(b'"model"\r\n', b'"model"\n') + END,
    "something behind a boundary": part(value=b"a\r\n--b \r\n") + END,
    "the boundary in a value": part(value=b"x--b") + END,
    "too many parts": part(b'form-data; name="x"') * (PARTS_MAX + 1) + END,
    "long headers": part(b'form-data; name="x"', b"v", b"X: " + b"a" * 8_192) + END,
    "long headers together": part(b'form-data; name="x"', b"v", b"X: " + b"a" * 5_000, b"Y: " + b"a" * 4_000) + END,
    "a space before a colon": part().replace(b"Disposition:", b"Disposition :") + b"x" + END,
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_a_form_that_two_parsers_read_differently_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        form_fields(body, TYPE, NAMES)
    assert caught.value.reason is Reason.REQUEST_MALFORMED


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data", b"multipart/form-data; boundary=", b'multipart/form-data; boundary=""',
        b"multipart/form-data; boundary=b; boundary=b", b"multipart/form-data; boundary=b; Boundary=c",
        b"multipart/form-data; boundary*=utf-8''b", b"multipart/form-data; boundary*0=b",
        b"multipart/form-data; boundary=b b", b"multipart/form-data; x-boundary=c; boundary=b",
        b'multipart/form-data; x="boundary=c"; boundary=b', b"multipart/form-data; boundary=b; x=boundary",
        b"multipart/form-data; boundary=c-boundary=b",
        b"multipart/form-data; boundary=b; x", b'multipart/form-data; boundary="b',
        b"multipart/form-data; boundary=" + b"b" * 71,
        b"multipart/form-data; boundary=b; charset=utf-16", b'multipart/form-data; boundary="b\\"',
    ],
)  # fmt: skip
def test_a_boundary_stands_once_in_plain_characters(content_type: bytes) -> None:
    with pytest.raises(Refusal):
        form_fields(part() + END, content_type, NAMES)


LONG = {
    "parts with long names": part(b'form-data; name="%b"' % (b"a" * 8_000)),
    "parts with encoded names": part(b'form-data; name="%b"' % (b"%41" * 2_600)),
    "parts with many parameters": part(b"form-data; name=x" + b"".join([b"; k%d=v" % number for number in range(900)])),
    "one long value": part(b"form-data; name=x", b"\r\n-" * 2_000_000),
}


@pytest.mark.parametrize("body", LONG.values(), ids=LONG)
def test_a_form_is_read_in_portions_of_a_few_milliseconds(body: bytes) -> None:
    reading = FormReading(body * min(PARTS_MAX, 8_000_000 // len(body)) + END, TYPE, NAMES)
    longest, is_read = 0.0, False
    while not is_read:
        begun = time.thread_time()
        is_read = reading.advance()
        longest = max(longest, time.thread_time() - begun)
    assert longest < 0.05


@pytest.mark.parametrize("size", [65_400, 65_536 - 120, 65_536, 131_000])
def test_a_form_is_read_alike_wherever_its_portions_end(size: int) -> None:
    for more in range(140):
        body = part(b"form-data; name=x", b"v" * (size + more)) + part() + END
        assert form_fields(body, TYPE, NAMES) == {"model": "small"}
        with pytest.raises(Refusal):
            form_fields(part() + body, TYPE, NAMES)
