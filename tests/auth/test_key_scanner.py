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

FORMAT = KeyFormat()
LIVE = FORMAT.make(bytes(range(32)), is_test=False).reveal()
TEST = FORMAT.make(bytes(range(1, 33)), is_test=True).reveal()
OLD = KeyFormat("acme2").make(bytes(32), is_test=False).reveal()
ADMIN = FORMAT.make_admin_token(bytes(32)).reveal()
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
    ],
)  # fmt: skip
def test_no_text_takes_long(piece: bytes) -> None:
    count = key_scanner.TEXT_BYTES_MAX // (len(piece) + 6)
    text = b"".join(piece % number if b"%d" in piece else piece for number in range(count))
    began = time.process_time()
    scan(text, FORMAT)
    # Seconds of CPU: what grows with the square of the length would take minutes.
    assert time.process_time() - began < 10
