"""Keys in pasted text: found however they are written, distinguished from what only looks like one, and never shown."""

from __future__ import annotations

import json
import random
import time
from urllib.parse import quote

import pytest

from keyproxy.auth import key_scanner
from keyproxy.auth.api_key import KeyFormat
from keyproxy.auth.key_scanner import Scan, scan
from tests.auth.test_agent_token_format import ASSERTION_HEADER, HEADER, jwt

FORMAT = KeyFormat()
LIVE = FORMAT.make(bytes(range(32)), is_test=False).reveal()
TEST = FORMAT.make(bytes(range(1, 33)), is_test=True).reveal()
OLD = KeyFormat("acme2").make(bytes(32), is_test=False).reveal()
ADMIN = FORMAT.make_admin_token(bytes(32)).reveal()
TOKEN = jwt(HEADER, b'{"iss":"keyproxy","sub":"u_42","jti":"agt_0"}', bytes(range(64)))
OTHER_TOKEN = jwt(HEADER, b'{"jti":"agt_1"}', bytes(range(64, 128)))
DJANGO = b"Ab3dE6gH." + b"0123456789abcdefABCDEF0123456789"


def keys(found: Scan) -> list[bytes]:
    """The plaintexts of what was found."""
    return [key.reveal() for key in found.keys]


@pytest.mark.parametrize(
    "text",
    [
        LIVE,
        b"Authorization: Api-Key " + LIVE,
        b"authorization: bearer " + LIVE + b"\r\n",
        b"X-Api-Key:" + LIVE,
        b'KEY="' + LIVE + b'"',
        b"export KEY='" + LIVE + b"';",
        b"The key is " + LIVE + b". Please revoke it!",
        b"(" + LIVE + b"),",
        b"https://h.example/v1?api_key=" + LIVE + b"&page=2#top",
        quote("https://h.example/?key=" + LIVE.decode().replace("_", "%5F")).encode(),
        json.dumps({"log": json.dumps({"key": "line\n" + LIVE.decode()})}).encode(),
        LIVE.replace(b"_", b"\\u005f"),
        LIVE.replace(b"_", b"&#95;"),
        b"xy\\n" + LIVE + b"\\nrest",
        LIVE[:3] + b"\n" + LIVE[3:],
        LIVE[:30] + b"\r\n" + LIVE[30:],
        b"> " + LIVE[:30] + b"=\r\n> " + LIVE[30:] + b"\r\n",
        b'"' + LIVE[:30] + b'" +\n    "' + LIVE[30:] + b'"',
        LIVE[:30] + b"\\\n" + LIVE[30:],
        LIVE[:20] + "\u200b".encode() + LIVE[20:],
        b"\x1b[01;31m\x1b[K"[:8] + LIVE + b"\x1b[m",
        LIVE.decode().encode("utf-16"),
    ],
)  # fmt: skip
def test_a_key_is_found_however_it_is_written(text: bytes) -> None:
    assert LIVE in keys(scan(text, FORMAT))


def tokens(found: Scan) -> list[bytes]:
    """The plaintexts of the agent tokens that were found."""
    return [token.reveal() for token in found.agent_tokens]


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        b"Authorization: Bearer " + TOKEN + b"\r\n",
        b"x-api-key:" + TOKEN,
        b'{"token": "' + TOKEN + b'"}',
        b"The token is " + TOKEN + b". Please revoke it!",
        b"https://h.example/v1?access_token=" + TOKEN + b"&page=2#top",
        "".join(f"%{sign:02X}" for sign in TOKEN).encode(),
        "".join(f"%25{sign:02x}" for sign in TOKEN).encode(),
        json.dumps({"log": json.dumps({"key": "line\n" + TOKEN.decode() + "\nrest"})}).encode(),
        TOKEN.replace(b".", b"\\u002e"),
        TOKEN.replace(b".", b"&#46;"),
        TOKEN[:20] + b"\n" + TOKEN[20:],
        b"> " + TOKEN[:76] + b"=\r\n> " + TOKEN[76:152] + b"=\r\n> " + TOKEN[152:] + b"\r\n",
        b'"' + TOKEN[:130] + b'" +\n    "' + TOKEN[130:] + b'"',
        TOKEN[:20] + "\u200b".encode() + TOKEN[20:],
        TOKEN.decode().encode("utf-16"),
    ],
)  # fmt: skip
def test_an_agent_token_is_found_however_it_is_written(text: bytes) -> None:
    found = scan(text, FORMAT)
    assert (tokens(found), found.incomplete) == ([TOKEN], 0)
    assert (found.keys, found.presented) == ([], [])
    assert TOKEN not in [one.reveal() for one in found.foreign]


def test_agent_tokens_and_keys_of_a_text_are_found_each_once() -> None:
    found = scan(b"\n".join([TOKEN, LIVE, OTHER_TOKEN, TOKEN, TOKEN[:150] + OTHER_TOKEN]), FORMAT)
    assert (tokens(found), keys(found)) == ([TOKEN, OTHER_TOKEN], [LIVE])


@pytest.mark.parametrize(
    ("text", "incomplete"),
    [
        (TOKEN[:40], 0),
        (TOKEN[:48], 1),
        (TOKEN[:150], 1),
        (TOKEN[:-1], 1),
        (TOKEN[:150] + b" " + TOKEN[:150] + b" " + TOKEN[:48] + b" " + OTHER_TOKEN[:-1], 3),
        (TOKEN + b" " + TOKEN[:150], 0),
        (TOKEN[:150] + b"\n" + TOKEN[150:], 0),
        (
            TOKEN[:150]
            + b" and so on. "
            + b"This is the end of a sentence that has very many letters in it, and more. " * 3,
            1,
        ),
        (jwt(ASSERTION_HEADER), 0),
        (jwt(b'{"alg":"HS256"}'), 0),
    ],
)
def test_starts_of_agent_tokens_without_the_rest_are_counted(text: bytes, incomplete: int) -> None:
    found = scan(text, FORMAT)
    assert found.incomplete == incomplete
    assert set(tokens(found)) <= {TOKEN}


def test_a_json_web_token_of_another_issuer_is_no_key_of_another_program() -> None:
    token = jwt(b'{"alg":"HS256"}', b"{}", b"s" * 32)
    for text in (token, b"Authorization: Bearer " + token, b'{"api_key": "' + token + b'"}'):
        found = scan(text, FORMAT)
        assert (tokens(found), found.presented) == ([], [])
        assert token not in [one.reveal() for one in found.foreign]


def test_all_keys_of_a_text_are_found_each_once() -> None:
    text = b"\n".join([LIVE, TEST, LIVE, b"prefix=" + OLD, b"x" * 100, LIVE + TEST])
    assert sorted(keys(scan(text, FORMAT))) == sorted([LIVE, TEST, OLD])


@pytest.mark.parametrize(
    ("text", "incomplete"),
    [
        (b"no key at all", 0),
        (b"kp_live_", 0),
        (b"see /docs/kp_live_ for more", 0),
        (LIVE, 0),
        (LIVE[:-1], 1),
        (LIVE[:9], 1),
        (LIVE[:-1] + (b"a" if LIVE[-1:] != b"a" else b"b"), 1),
        (b"kp_live_AbCd\xe2\x80\xa6wXyZ", 1),
        (LIVE[:20] + b" " + TEST[:20] + b" " + LIVE[:20], 2),
        (LIVE + b" " + LIVE[:20], 0),
        (OLD[:30], 0),
    ],
)
def test_starts_of_keys_without_the_rest_are_counted(text: bytes, incomplete: int) -> None:
    assert scan(text, FORMAT).incomplete == incomplete


@pytest.mark.parametrize(
    "text",
    [
        DJANGO,
        b"Authorization: Api-Key " + DJANGO + b"\n",
        b'{"api_key": "' + DJANGO + b'"}',
        b"curl -H 'X-Api-Key: " + DJANGO + b"'",
        b"KEY=" + DJANGO + b";",
        b"The key " + DJANGO + b", which leaked.",
    ],
)
def test_a_key_of_another_program_is_a_candidate_where_those_are_accepted(text: bytes) -> None:
    found = scan(text, FORMAT)
    assert DJANGO in [one.reveal() for one in found.foreign]
    assert DJANGO in [one.reveal() for one in found.presented]
    assert found.keys == []
    ours_alone = scan(text, KeyFormat(accepts_foreign=False))
    assert (ours_alone.foreign, ours_alone.presented) == ([], [])


@pytest.mark.parametrize(
    "text", [b"Bearer credentials are kept secret", b"https://example.com/page1", b"version 1.2.3.4"]
)
def test_prose_is_not_meant_as_a_key(text: bytes) -> None:
    assert scan(text, FORMAT).presented == []


def test_tokens_of_the_admin_api_and_digests_are_distinguished() -> None:
    found = scan(b"token " + ADMIN + b" sha256 " + b"AB" * 32, FORMAT)
    assert (keys(found), found.admin_tokens, found.digests) == ([], 1, [b"\xab" * 32])


def test_the_length_of_a_text_is_bounded() -> None:
    assert keys(scan(b" " * (key_scanner.TEXT_BYTES_MAX - len(LIVE)) + LIVE, FORMAT)) == [LIVE]
    with pytest.raises(ValueError, match="512 KiB"):
        scan(b" " * (key_scanner.TEXT_BYTES_MAX + 1), FORMAT)


def test_any_bytes_are_text_and_nothing_shows_a_key() -> None:
    noise = random.Random(7)
    for _ in range(300):
        junk = noise.randbytes(noise.randrange(60))
        found = scan(junk + b" " + LIVE + b" " + junk, FORMAT)
        assert LIVE in keys(found)
        assert LIVE.decode() not in repr(found)


@pytest.mark.parametrize(
    "piece",
    [
        b"bearer ", b" ", b"bearer" + b" " * 5000, b"kp_live_%d ", b"_live_", b"a_live_" + b"b" * 49 + b" ", b"%25",
        b"&#38;",
        b"\x1b[", b"\x1b[1;", b"a=", b"abcdefgh.", b"api_key:", b"0" * 64 + b" ", b"\\u005f", LIVE, LIVE + b" ", b"x.",
        TOKEN, TOKEN + b" ", TOKEN[:60], TOKEN[:111], TOKEN[:150] + b"\n",
    ],
)  # fmt: skip
def test_no_text_takes_long(piece: bytes) -> None:
    count = key_scanner.TEXT_BYTES_MAX // (len(piece) + 6)
    text = b"".join(piece % number if b"%d" in piece else piece for number in range(count))
    began = time.process_time()
    scan(text, FORMAT)
    # Seconds of CPU: what grows with the square of the length would take minutes.
    assert time.process_time() - began < 10


OF_OAUTH = [
    make(bytes(32)).reveal()
    for make in (FORMAT.make_access_token, FORMAT.make_refresh_token, FORMAT.make_client_secret)
]


@pytest.mark.parametrize("secret", OF_OAUTH)
def test_secrets_of_oauth_are_no_keys_and_found_however_they_are_written(secret: bytes) -> None:
    for text in (
        secret,
        b"refresh_token=" + secret + b"&x=1",
        secret[:30] + b"\r\n" + secret[30:],
        LIVE + b" " + secret,
    ):
        found = scan(text, FORMAT)
        assert [one.reveal() for one in found.oauth_secrets] == [secret]
        assert (keys(found), found.admin_tokens, found.incomplete) == ([LIVE] if LIVE in text else [], 0, 0)
        assert secret not in [one.reveal() for one in (*found.foreign, *found.presented)]
    truncated = scan(secret[:-9], FORMAT)
    assert (truncated.oauth_secrets, truncated.incomplete) == ([], 1)
