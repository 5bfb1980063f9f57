"""The usage of a request is bounded from above, and no two parsers disagree about its bound."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.ai.requests.body_reading import BodyReading
from keyproxy.ai.requests.forwarded_headers import for_metering
from keyproxy.ai.requests.member_names import _MET_MAX, _met
from keyproxy.ai.requests.request_bound import MEDIA_TOKENS, PARSED_BYTES_MAX, TOOLS_TOKENS, TokenBound, bound_of
from keyproxy.ai.responses.usage_objects import TOKENS_MAX
from keyproxy.http.headers import FieldNames
from keyproxy.model import RequestHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing.head_cache import RequestReader

JSON = b"Content-Type: application/json\r\n"
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def head(block: bytes = JSON, path: bytes = b"/v1/chat/completions") -> RequestHead:
    raw = b"POST %b HTTP/1.1\r\nHost: h\r\n%b\r\n" % (path, block)
    return RequestReader(FieldNames(), lambda _: False).read(raw, len(raw) - 4)


def ask(body: bytes, block: bytes = JSON, *, kind: str = "openai", path: bytes = b"/v1/chat/completions") -> TokenBound:
    return bound_of(kind, head(block, path), body) or read(body, block, kind=kind, path=path)


def read(
    body: bytes, block: bytes = JSON, *, kind: str = "openai", path: bytes = b"/v1/chat/completions"
) -> TokenBound:  # fmt: skip
    """The same for a body of any length, in portions. The new body is where `bound_of` has it."""
    reading = BodyReading(kind, head(block, path), body, bytes_max=100_000)
    while not reading.advance():
        pass
    assert reading.asked is not None
    if reading.asked.hides_usage:
        reading.asked.body = reading.body
    else:
        assert reading.body is body
    return reading.asked


def chat(**members: object) -> bytes:
    return json.dumps({**CHAT, **members}).encode()


def refused(body: bytes, block: bytes = JSON) -> Reason:
    with pytest.raises(Refusal) as caught:
        ask(body, block)
    assert caught.value.reason.value.status in (400, 413)
    return caught.value.reason


@pytest.mark.parametrize(
    ("members", "maximum"),
    [
        ({}, None),
        ({"max_tokens": None}, None),
        ({"n": 3}, None),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": 1}, 1),
        ({"max_completion_tokens": 7}, 7),
        ({"max_output_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "n": None}, 5),
        ({"max_tokens": 5, "n": 0}, 5),
        ({"max_tokens": 5, "n": 1}, 5),
        ({"max_tokens": 5, "n": 3}, 15),
        ({"max_tokens": 5, "n": 2, "best_of": 4}, 20),
        ({"max_tokens": 5, "prompt": "ab"}, 5),
        ({"max_tokens": 5, "prompt": ["a", "b", "c"]}, 15),
        ({"max_tokens": 5, "prompt": [1, 2, 3]}, 5),
        ({"max_tokens": 5, "prompt": [[1, 2], [3]], "n": 2}, 20),
        ({"max_tokens": 5, "prompt": []}, 5),
        ({"max_tokens": TOKENS_MAX}, TOKENS_MAX),
        ({"max_tokens": TOKENS_MAX, "n": TOKENS_MAX}, 10**15),
    ],
)
@pytest.mark.parametrize("kind", ["openai", "anthropic", "header"])
def test_the_most_that_may_be_put_out_is_what_the_request_allows_for_all_it_asks_for(
    kind: str, members: dict[str, object], maximum: int | None
) -> None:
    assert ask(chat(**members), kind=kind).maximum == maximum


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of"])
@pytest.mark.parametrize("value", ["-1", "1.0", "1e3", '"5"', "true", "[5]", "{}", str(TOKENS_MAX + 1), "9" * 5000])
def test_a_maximum_that_is_no_whole_number_is_refused(name: str, value: str) -> None:
    assert refused(b'{"model":"m","%b":%b}' % (name.encode(), value.encode())) is Reason.REQUEST_MALFORMED


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of"])
@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("100.0", "has a fraction or an exponent"),
        ("0.5", "has a fraction or an exponent"),
        ("1e3", "has a fraction or an exponent"),
        ('"100"', "is a string"),
        ("true", "is a boolean"),
        ("false", "is a boolean"),
        ("-1", "is negative"),
        ("-0.5", "is negative"),
        ("-1e400", "is negative"),
        (str(TOKENS_MAX + 1), "is too large"),
        (str(2**63), "is too large"),
        (str(2**64), "is too large"),
        ("1e400", "is too large"),
        ("9" * 1_000, "is too large"),
        ("[100]", "is an array"),
        ('{"value":100}', "is an object"),
    ],
)
@pytest.mark.parametrize("is_long", [False, True])
def test_a_refused_maximum_is_named_with_its_fault(name: str, value: str, fault: str, is_long: bool) -> None:
    filler = "x" * 70_000 if is_long else "x"
    with pytest.raises(Refusal) as caught:
        ask(f'{{"model":"{filler}","{name}":{value}}}'.encode())
    assert caught.value.field == name
    assert caught.value.caller_text == f"'{name}' {fault}; it must be a whole number from 0 to {TOKENS_MAX}."
    assert value[:4] not in caught.value.caller_text.replace(str(TOKENS_MAX), "") or value in ("true", "false")


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        (b'{"max_tokens":1,"max_tokens":9}', "max_tokens", "'max_tokens' appears twice."),
        (b'{"stream_options":{"include_usage":true,"include_usage":true}}', "include_usage",
         "'include_usage' appears twice."),
        (b'{"stream":true,"messages":[],"stream_options":"x"}', "stream_options",
         "'stream_options' is a string; it must be an object."),
        (b'{"stream":true,"messages":[],"stream_options":[]}', "stream_options",
         "'stream_options' is an array; it must be an object."),
        (b'{"max_tokens":1', None,
         "The body is not well-formed JSON in UTF-8: it ends early or is invalid at character 15."),
        (b'{"max_tokens":NaN}', None,
         "The body is not well-formed JSON in UTF-8: it ends early or is invalid at character 14."),
    ],
)  # fmt: skip
def test_the_fault_of_a_body_is_named(body: bytes, field: str | None, said: str) -> None:
    with pytest.raises(Refusal) as caught:
        ask(body)
    assert (caught.value.field, caught.value.caller_text, caught.value.replaces_sentence) == (field, said, True)


@pytest.mark.parametrize(
    "body",
    [
        b'{"max_tokens":1,"max_tokens":9}',
        b'{"max_tokens":1,"max_tokens":1}',
        b'{"max_tokens":1,"max\\u005ftokens":9}',
        b'{"max\\u005ftokens":1,"max\\u005ftokens":9}',
        b'{"Max_Tokens":9}',
        b'{"max_tokens":1,"MAX_TOKENS":9}',
        b'{"max_tokens":1,"max_tokens\\u0000":9}',
        b'{"max_tokens":1,"N\\u0000 ":9}',
        b'{"max_token\xc5\xbf":9}',
        b'{"max_to\xe2\x84\xaaens":9}',
        b'{"be\xef\xac\x86_of":9}',
        b'{"max_complet\xc4\xb1on_tokens":9}',
        b'{"MAX_COMPLET\xc4\xb0ON_TOKENS":9}',
        b'{"stream":true,"messages":[],"stream_options":{"include_usage":true,"INCLUDE_USAGE":false}}',
        b'{"n":1,"n":2}',
        b'{"stream":true,"stream":false,"messages":[]}',
        b'{"stream_options":{},"stream_options":null}',
        b'{"stream_options":{"include_usage":false,"include_usage":true}}',
        b'{"max_tokens":1',
        b"{'max_tokens':1}",
        b'{"max_tokens":NaN}',
        b'{"a":"\xff"}',
        b'\xef\xbb\xbf{"max_tokens":1}',
        '{"max_tokens":1}'.encode("utf-16"),
        b'{"max_tokens":1} {"max_tokens":2}',
        b'{"max_tokens":1}x',
        b"[" * 100_000,
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b'{"n":1,"n":1,"a":' + b"[" * 1010 + b"]" * 1010 + b"}",
        b'{"messages":[],"stream":true,"stream_options":"x"}',
    ],
)
def test_a_body_that_is_broken_or_has_two_readings_is_refused(body: bytes) -> None:
    assert refused(body) is Reason.REQUEST_MALFORMED


@pytest.mark.parametrize(
    "body",
    [
        b'{"max_tokens":5,"tools":[{"properties":{"n":{},"N":{},"max_tokens":1}},{"properties":{"n":{}}}]}',
        b'{"max_tokens":5,"messages":[{"content":"\\"max_tokens\\": 1, \\u00e4 max_tokens"}]}',
        b'{"max_tokens":5,"a":1,"a":2}',
        b' \n{ "max_tokens" :\t5 }\n',
    ],
)
def test_insignificant_content_is_not_restricted(body: bytes) -> None:
    assert ask(body).maximum == 5


@pytest.mark.parametrize(
    ("block", "body", "expected"),
    [
        (JSON, b"", (0, 0)),
        (b"", b" \n", (0, 0)),
        (b"Content-Type: text/plain\r\n", b"", (0, 0)),
        (b"Content-Type: text/plain\r\n", b"{", (1, None)),
        (b"Content-Type: multipart/form-data; boundary=x\r\n", b"--x\r\n", (5, None)),
        (b"Content-Type: text/plain\r\n", b'{"max_tokens":5}', (16, 5)),
        (b"Content-Type: text/plain\r\n", b' {"max_tokens":', (15, None)),
        (b"", b'{"max_tokens":5}', (16, 5)),
        (b"content-type: Application/X+JSON ; charset=utf-8\r\n", b'{"max_tokens":5}', (16, 5)),
        (JSON, b"[1,2]", (5, None)),
        (JSON, b"12", (2, None)),
    ],
)
def test_a_body_is_read_for_what_it_is(block: bytes, body: bytes, expected: tuple[int, int | None]) -> None:
    asked = ask(body, block)
    assert (asked.prompt_bound, asked.maximum) == expected


def test_embeddings_put_nothing_out_and_a_route_of_any_kind_may_put_out_without_a_body() -> None:
    body = b'{"model":"m","input":["a","b"]}'
    assert ask(body, path=b"/v1/embeddings").maximum == 0
    assert ask(body, path=b"/v1/responses").maximum is None
    assert ask(b"", kind="header").maximum is None


@pytest.mark.parametrize("kind", ["openai", "anthropic", "header"])
def test_the_output_of_a_tunnel_is_unknown(kind: str) -> None:
    raw = (
        b"GET /v1/realtime HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    handshake = RequestReader(FieldNames(), lambda _: False).read(raw, len(raw) - 4)
    asked = bound_of(kind, handshake, b"")
    assert asked is not None
    assert asked.maximum is None


def test_ever_new_names_are_read_alike_and_fill_no_memory() -> None:
    for number in range(_MET_MAX + 10):
        assert ask(b'{"name_%d":1,"n":3,"max_tokens":%d}' % (number, number)).maximum == 3 * number
        assert len(_met) <= _MET_MAX
    before = len(_met)
    assert ask(b'{"%b":1,"max_tokens":7}' % (b"x" * 1_000)).maximum == 7
    assert len(_met) == before


DATA_URL = "data:image/png;base64," + "A" * 9000


@pytest.mark.parametrize(
    ("part", "bound"),
    [
        ({"type": "text", "text": "Hi"}, 0),
        ({"type": "image_url", "image_url": {"url": "https://x/y.png"}}, MEDIA_TOKENS),
        ({"type": "image_url", "image_url": {"url": DATA_URL}}, MEDIA_TOKENS - len(DATA_URL)),
        ({"type": "input_image", "image_url": DATA_URL}, MEDIA_TOKENS - len(DATA_URL)),
        ({"type": "image", "source": {"type": "base64", "data": "A" * 9000}}, MEDIA_TOKENS - 9000),
        ({"type": "image", "source": {"type": "url", "url": "https://x"}}, MEDIA_TOKENS),
        ({"type": "input_audio", "input_audio": {"data": "A" * 9000}}, MEDIA_TOKENS),
        ({"type": "document", "source": {"type": "base64", "data": "A" * 9000}}, MEDIA_TOKENS),
        ({"type": "text", "image_url": DATA_URL}, 0),
        ({"type": "image", "text": "A" * 9000}, MEDIA_TOKENS),
    ],
)
def test_the_prompt_s_bound_is_the_body_s_length_with_media_by_their_own(part: dict[str, Any], bound: int) -> None:
    body = chat(messages=[{"role": "user", "content": [part, {"type": "tool_result", "content": [part]}]}])
    assert ask(body).prompt_bound == len(body) + 2 * bound
    spelt = body.replace(b'"type"', b'"t\\u0079pe"')
    assert ask(spelt).prompt_bound == len(spelt) + 2 * bound


@pytest.mark.parametrize("escape", [("/", "\\/"), ("/", "\\u002F"), ("data:i", "\\u0064ata\\u003ai")])
@pytest.mark.parametrize("image_bytes", [9_000, 90_000])
def test_an_image_counts_without_its_bytes_however_its_url_is_escaped(
    escape: tuple[str, str], image_bytes: int
) -> None:
    url = "data:image/png;base64," + "A" * image_bytes
    spelt = url.replace(*escape)
    for part, said in (('{"url":"%s"}', "image_url"), ('"%s"', "input_image")):
        body = f'{{"messages":[{{"type":"{said}","image_url":{part % spelt}}}]}}'.encode()
        bound = bound_of("openai", head(), body) if image_bytes < PARSED_BYTES_MAX else read(body)
        assert bound is not None
        assert abs(bound.prompt_bound - (len(body) + MEDIA_TOKENS - len(spelt))) < 12


def test_tools_add_the_tokens_that_anthropic_documents() -> None:
    body = chat(tools=[{"name": "t"}])
    assert ask(body, kind="anthropic").prompt_bound == len(body) + TOOLS_TOKENS
    assert ask(body, kind="openai").prompt_bound == len(body)


# -- usage that is requested on the client's behalf


@pytest.mark.parametrize(
    ("body", "new"),
    [
        (b'{"messages":[],"stream":true}', b'{"stream_options":{"include_usage":true},"messages":[],"stream":true}'),
        (
            b' {\n "prompt":"a","stream":true}',
            b' {"stream_options":{"include_usage":true},\n "prompt":"a","stream":true}',
        ),
        (
            b'{"messages":[12345678901234567890,1.50,"\\u00e4"],"stream":true,"stream_options": null }',
            b'{"messages":[12345678901234567890,1.50,"\\u00e4"],"stream":true,"stream_options": {"include_usage":true} }',
        ),
        (
            b'{"messages":[],"stream_options":{ },"stream":true}',
            b'{"messages":[],"stream_options":{"include_usage":true },"stream":true}',
        ),
        (
            b'{"messages":[],"stream_options":{"include_obfuscation":false},"stream":true}',
            b'{"messages":[],"stream_options":{"include_usage":true,"include_obfuscation":false},"stream":true}',
        ),
        (
            b'{"stream_options":{"x":[{}],"include_usage" : false},"\xc3\xa4":"}","messages":[],"stream":true}',
            b'{"stream_options":{"x":[{}],"include_usage" : true},"\xc3\xa4":"}","messages":[],"stream":true}',
        ),
        (
            b'{"a":{"stream_options":{}},"messages":[],"stream_options":{"x":1},"stream":true}',
            b'{"a":{"stream_options":{}},"messages":[],"stream_options":{"include_usage":true,"x":1},"stream":true}',
        ),
    ],
)
def test_usage_is_requested_of_a_stream_and_nothing_else_of_the_body_changes(body: bytes, new: bytes) -> None:
    found = ask(body)
    assert (found.body, found.hides_usage, found.streams, found.prompt_bound) == (new, True, True, len(body))


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (chat(), "openai"),
        (chat(stream=False), "openai"),
        (chat(stream="true"), "openai"),
        (chat(stream=True), "anthropic"),
        (chat(stream=True), "header"),
        (chat(stream=True, stream_options={"include_usage": True}), "openai"),
        (b'{"model":"m","input":"a","stream":true}', "openai"),
        (b'{"model":"m","input":"a","prompt":{"id":"p"},"stream":true}', "openai"),
        (b'{"model":"m","prompt":{"id":"p"},"stream":true}', "openai"),
    ],
)
def test_no_usage_is_requested_where_it_is_reported_anyway_or_cannot_be_requested(body: bytes, kind: str) -> None:
    found = ask(body, kind=kind)
    assert (found.body, found.hides_usage) == (None, False)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
options = st.none() | st.fixed_dictionaries({}, optional={"include_usage": st.none() | st.just(False), "{x": values})


@given(
    st.dictionaries(
        st.text(max_size=6).filter(lambda name: name.casefold() not in ("n", "prompt", "stream")), values, max_size=4
    ),
    st.fixed_dictionaries({}, optional={"stream_options": options}),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_the_new_body_is_the_same_json_but_for_the_usage(
    others: dict[str, Any], given_options: dict[str, Any], indent: int | None, is_ascii: bool, random: Any
) -> None:
    members = list({**others, **CHAT, "stream": True, **given_options}.items())
    random.shuffle(members)
    body = json.dumps(dict(members), indent=indent, ensure_ascii=is_ascii).encode()
    new = ask(body).body
    assert new is not None
    wanted = {**dict(members), "stream_options": {**(given_options.get("stream_options") or {}), "include_usage": True}}
    assert json.loads(new) == wanted


# -- compressed


@pytest.mark.parametrize(("encoding", "bits"), [(b"gzip", 31), (b"X-GZIP", 31), (b"deflate", 15), (b"deflate", -15)])
def test_a_compressed_body_is_read_and_forwarded_in_the_same_coding(encoding: bytes, bits: int) -> None:
    compressor = zlib.compressobj(wbits=bits)
    body = chat(max_tokens=5, stream=True)
    raw = compressor.compress(body) + compressor.flush()
    found = ask(raw, JSON + b"Content-Encoding: %b\r\n" % encoding)
    assert (found.prompt_bound, found.maximum, found.hides_usage) == (len(body), 5, True)
    assert found.body is not None
    assert zlib.decompress(found.body, wbits=bits) == ask(body).body


@pytest.mark.parametrize(
    ("encoding", "body", "reason"),
    [
        (b"br", b"x", Reason.REQUEST_MALFORMED),
        (b"gzip, gzip", b"x", Reason.REQUEST_MALFORMED),
        (b"gzip\r\nContent-Encoding: gzip", b"x", Reason.REQUEST_MALFORMED),
        (b"gzip", chat(), Reason.REQUEST_MALFORMED),
        (b"gzip", gzip.compress(chat(), mtime=0)[:-1], Reason.REQUEST_MALFORMED),
        (b"gzip", gzip.compress(chat(), mtime=0) + gzip.compress(b"x", mtime=0), Reason.REQUEST_MALFORMED),
        (b"gzip", gzip.compress(b" " * 100_001), Reason.BODY_TOO_LARGE),
        (b"gzip", gzip.compress(b" " * 50_000_000), Reason.BODY_TOO_LARGE),
    ],
)
def test_a_compressed_body_that_cannot_be_bounded_is_refused(encoding: bytes, body: bytes, reason: Reason) -> None:
    assert refused(body, JSON + b"Content-Encoding: %b\r\n" % encoding) is reason


def test_a_compressed_body_may_grow_to_the_bound() -> None:
    block = JSON + b"Content-Encoding: gzip\r\n"
    padded = chat() + b" " * (100_000 - len(chat()))
    assert ask(gzip.compress(padded, mtime=0), block).prompt_bound == 100_000


@given(st.binary(max_size=80) | st.text('{}[]":,\\ntrue15max_tokens', max_size=80).map(str.encode))
def test_no_body_raises_anything_but_a_refusal(body: bytes) -> None:
    for block in (JSON, b"", JSON + b"Content-Encoding: gzip\r\n", JSON + b"Content-Encoding: deflate\r\n"):
        try:
            found = ask(body, block)
        except Refusal as refusal:
            assert refusal.reason in (Reason.REQUEST_MALFORMED, Reason.BODY_TOO_LARGE)  # noqa: PT017
        else:
            assert found.prompt_bound >= 0


@pytest.mark.parametrize(
    ("block", "going"),
    [
        (b"", b""),
        (b"Accept-Encoding: gzip\r\n", b""),
        (b"ACCEPT-encoding: gzip\r\nA: accept-encoding: br\r\naccept-encoding:br\r\n", b"A: accept-encoding: br\r\n"),
        (
            b"B: c\r\nAccept-Encoding:\r\nAccept-Encoding: x\r\nAccept-Encodings: y\r\n",
            b"B: c\r\nAccept-Encodings: y\r\n",
        ),
    ],
)
def test_a_metered_request_requests_a_readable_response(block: bytes, going: bytes) -> None:
    asks = going + b"Accept-Encoding: identity\r\n"
    assert for_metering(block, accepts_codings=True, content_length=None) == asks
    longer = b"content-length: 5\r\n" + block
    assert (
        for_metering(longer, accepts_codings=True, content_length=7)
        == going + b"Content-Length: 7\r\n" + asks[len(going) :]
    )
