"""Agent tokens: what has their form, and where one is found in text."""

from __future__ import annotations

import base64
import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keyproxy.auth import agent_token_format
from keyproxy.auth.agent_token_format import TOKEN_BYTES_MAX, is_jwt, make_token_id
from keyproxy.signing.claims import AGENT_TOKEN_TYPE, ASSERTION_TYPE
from keyproxy.signing.signing_key import SigningKey


def part(content: bytes) -> bytes:
    """A part of a token."""
    return base64.urlsafe_b64encode(content).rstrip(b"=")


def jwt(header: bytes, claims: bytes = b'{"sub":"u_42"}', signature: bytes = b"s" * 64) -> bytes:
    """A token with these parts, not signed."""
    return b".".join([part(header), part(claims), part(signature)])


HEADER = b'{"typ":"at+jwt","alg":"ES256","kid":"%b"}' % (b"k" * 43)
ASSERTION_HEADER = HEADER.replace(b"at+jwt", b"keyproxy-assertion+jwt")
TOKEN = jwt(HEADER, b'{"jti":"agt_1"}')


@pytest.mark.parametrize(
    ("plaintext", "expected"),
    [
        (TOKEN, True),
        (jwt(ASSERTION_HEADER), True),
        (jwt(b'{"alg":"none"}', signature=b""), True),
        (jwt(b'{"alg":"HS256","typ":"JWT"}'), True),
        (jwt(b' {"kid":"1", "alg" : null}\n'), True),
        (jwt('{"é":"ü","alg":1}'.encode()), True),
        (jwt(b'{"\\u0061lg":"none"}'), True),
        (jwt(b'{"alg":"ES256"}', b"", b""), True),
        (jwt(b'{"typ":"JWT"}'), False),
        (jwt(b'["alg"]'), False),
        (jwt(b'"alg"'), False),
        (jwt(b"{'alg':1}"), False),
        (jwt(b'{"alg":1'), False),
        (jwt(b'{"alg":1}x'), False),
        (jwt(b'\xef\xbb\xbf{"alg":1}'), False),
        (jwt('{"alg":1}'.encode("utf-16")), False),
        (jwt(b'{"alg":"\xff"}'), False),
        (jwt(b""), False),
        (part(b'{"alg":1}') + b"." + part(b"{}"), False),
        (TOKEN + b".", False),
        (TOKEN + b"=", False),
        (TOKEN + b"\n", False),
        (b" " + TOKEN, False),
        (TOKEN.replace(b".", b"+", 1), False),
        (b"a.b.c", False),
        (b"..", False),
        (b"", False),
        (jwt(b'{"alg":%b}' % (b"[" * 2900)), False),
        (jwt(b'{"alg":%b}' % (b"[" * 1400 + b"]" * 1400)), False),
    ],
)
def test_a_json_web_token_is_three_base64url_parts_and_its_header_names_an_algorithm(
    plaintext: bytes, expected: bool
) -> None:
    assert is_jwt(plaintext) is expected


@pytest.mark.parametrize(("size", "expected"), [(TOKEN_BYTES_MAX, True), (TOKEN_BYTES_MAX + 1, False)])
def test_a_json_web_token_has_at_most_4096_bytes(size: int, expected: bool) -> None:
    start = part(b'{"alg":"ES256"}') + b"."
    assert is_jwt(start + b"a" * (size - len(start) - 1) + b".") is expected
    assert is_jwt(start + b"." + b"a" * (size - len(start) - 1)) is expected


@given(st.one_of(st.binary(), st.binary().map(jwt), st.text(alphabet='eyJ0._-=A{"').map(str.encode)))
@example(b"\x00.\x00.\x00")
def test_any_bytes_are_judged_without_an_error(plaintext: bytes) -> None:
    assert is_jwt(plaintext) in (True, False)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
members = st.dictionaries(st.text(max_size=5) | st.just("alg"), scalars | st.lists(scalars, max_size=3), max_size=3)
json_values = (
    scalars | st.lists(scalars | members, max_size=3) | members | st.dictionaries(st.text(), members, max_size=2)
)


@given(json_values, st.binary(max_size=50), st.binary(max_size=70), st.booleans())
def test_the_header_decides_and_the_other_parts_may_be_anything(
    header: object, claims: bytes, signature: bytes, is_ascii: bool
) -> None:
    try:
        raw = json.dumps(header, ensure_ascii=is_ascii).encode()
    except UnicodeEncodeError:
        return
    assert is_jwt(jwt(raw, claims, signature)) is (isinstance(header, dict) and "alg" in header)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 3000,
        b'{"a":' * 600,
        b'{"alg":' + b"9" * 3000 + b"}",
        b'{"alg":"' + b"\\u0041" * 490 + b'"}',
        b'{"alg":1' + b',"a":1' * 500 + b"}",
        b" " * 3000,
    ],
)
def test_no_header_takes_long(header: bytes) -> None:
    plaintext = jwt(header, b"", b"")
    assert len(plaintext) <= TOKEN_BYTES_MAX
    began = time.process_time()
    for _ in range(100):
        is_jwt(plaintext)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("piece", [b".", b"a", b"a.", b"..a", TOKEN, TOKEN + b".", TOKEN[:60]])
def test_no_text_takes_long(piece: bytes) -> None:
    text = piece * (1_000_000 // len(piece))
    began = time.process_time()
    is_jwt(text)
    agent_token_format.is_within(text)
    agent_token_format.masked(text.decode("ascii"))
    list(agent_token_format.whole_tokens(text))
    list(agent_token_format.truncated_tokens(text))
    assert time.process_time() - began < 2.0


@given(st.binary(min_size=16, max_size=16))
@example(bytes(16))
@example(b"\xff" * 16)
def test_a_token_id_contains_all_of_its_entropy(entropy: bytes) -> None:
    token_id = make_token_id(entropy)
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    number = 0
    for digit in token_id.removeprefix("agt_"):
        number = number * 62 + digits.index(digit)
    assert (len(token_id), token_id[:4], number) == (26, "agt_", int.from_bytes(entropy, "big"))


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_token_id_is_made_of_16_bytes_only(size: int) -> None:
    with pytest.raises(ValueError, match="16 random bytes"):
        make_token_id(bytes(size))


def test_signed_tokens_and_assertions_are_recognised_whichever_key_signed_them() -> None:
    for number in range(20):
        key = SigningKey.make(1_800_000_000.0 + number)
        claims = {"iss": "keyproxy", "sub": "ü" * number, "exp": 1_800_000_900}
        token = key.sign(AGENT_TOKEN_TYPE, claims | {"jti": make_token_id(bytes([number] * 16))})
        assertion = key.sign(ASSERTION_TYPE, claims)
        assert is_jwt(token)
        assert is_jwt(assertion)
        text = b"a token: " + token + b", and an assertion: " + assertion
        assert [*agent_token_format.whole_tokens(text)] == [token]
        assert [*agent_token_format.truncated_tokens(text)] == []
        masked = agent_token_format.masked(text.decode())
        assert token.partition(b".")[2].decode() not in masked
        assert assertion.partition(b".")[2].decode() not in masked


@pytest.mark.parametrize("start", ["", "token ", 'x"', "é", "?access=", "kp_live_"])
@pytest.mark.parametrize("end", ["", " and more", '"', "\n", "&x=y"])
@pytest.mark.parametrize("header", [HEADER, ASSERTION_HEADER])
@pytest.mark.parametrize("spelt", [str, str.upper, str.lower])
def test_a_token_is_masked_wherever_it_is_however_much_of_it_and_in_any_case(
    start: str, end: str, header: bytes, spelt: type[str]
) -> None:
    token = jwt(header).decode()
    for shown in (token, token[:100], token[: len(part(header)) + 20]):
        text = start + spelt(shown) + end
        assert agent_token_format.is_within(text.encode())
        masked = agent_token_format.masked(text)
        assert masked == start + spelt(shown)[: masked.index("…") - len(start)] + "…" + end
        assert len(masked) - len(start) - len(end) <= 70


@pytest.mark.parametrize(
    "token",
    [
        jwt(b'{"alg":"HS256","typ":"JWT"}'),
        jwt(b'{"alg":"RS256","kid":"1","typ":"at+jwt"}'),
        jwt(b'{"typ":"at+jwt","alg":"RS256","kid":"1"}'),
        jwt(b'{"typ":"JWT","alg":"ES256","kid":"1"}'),
    ],
)
def test_tokens_of_other_issuers_are_not_recognised(token: bytes) -> None:
    assert not agent_token_format.is_within(token)
    assert agent_token_format.masked(token.decode()) == token.decode()
    assert not [*agent_token_format.whole_tokens(token), *agent_token_format.truncated_tokens(token)]
