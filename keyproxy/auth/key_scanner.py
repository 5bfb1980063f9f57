"""Find keys in pasted text: headers, logs, shell scripts, JSON, URLs, mails with broken lines.

A keyproxy key, or a secret of OAuth, is recognised by its checksum, wherever it is and however the text was encoded or
wrapped. A key of another program has no checksum: every word that may be one is a candidate, which the store confirms or
rejects. An agent token is recognised by its form; its signature is not verified.
"""

from __future__ import annotations

import bisect
import html
import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from keyproxy.auth import agent_token_format
from keyproxy.auth.api_key import CHECKSUM_DIGITS, KEY_BYTES_MAX, RANDOM_DIGITS, KeyFormat, SecretKey

#: The maximum size of a text for one scan.
TEXT_BYTES_MAX: Final = 512 * 1024
TOO_LONG: Final = f"the text has more than {TEXT_BYTES_MAX // 1024} KiB: send it in parts"

_DIGITS: Final = RANDOM_DIGITS + CHECKSUM_DIGITS
_PREFIX_CHARACTERS_MAX: Final = 16
_DECODINGS_MAX: Final = 8
_FOREIGN_BYTES_MIN: Final = 8

_MARK = re.compile(rb"_(live|test|admin|access|refresh|client)_")
_ADMIN: Final = b"admin"
_OF_OAUTH: Final = (b"access", b"refresh", b"client")
_PREFIX = re.compile(rb"[a-z][a-z0-9]{0,%d}" % (_PREFIX_CHARACTERS_MAX - 1))
_BEFORE = re.compile(rb"[0-9a-z]{1,%d}\Z" % _PREFIX_CHARACTERS_MAX)
_RUN = re.compile(rb"[0-9A-Za-z]*")
_HEX_DIGEST = re.compile(rb"(?<![0-9A-Za-z])[0-9a-fA-F]{64}(?![0-9A-Za-z])")

_COLOURS = re.compile(rb"\x1b\[[0-9;]*m")
_ESCAPED = re.compile(rb"\\(?:u00|x)([0-9a-fA-F]{2})")
_ESCAPED_SPACE = re.compile(rb"\\[nrt]")
_ENTITY = re.compile(rb"&#?[0-9A-Za-z]{1,8};")
_NOT_OF_A_KEY = re.compile(rb"[^0-9A-Za-z_]+")
_NOT_OF_A_TOKEN = re.compile(rb"[^0-9A-Za-z_.-]+")

#: Word separators in any text: spaces, quotes, brackets and characters that no key may contain.
_BETWEEN_WORDS = re.compile(rb"[^A-Za-z0-9!#$%&'*+\-./:=?@^_`|~]+")
_INSIDE_WORDS = re.compile(rb"[=&?'`]|:(?!//)")
_ROUND_WORDS: Final = b".:;!?'`*_|~=&"
_PRESENTED = re.compile(
    rb"(?:api[-_]?key|bearer)[\"']?[ \t]{0,8}[:= ][ \t]{0,8}[\"']?([A-Za-z0-9!#$%%&*+\-./:=?@^_|~]{%d,%d})"
    % (_FOREIGN_BYTES_MIN, KEY_BYTES_MAX),
    re.IGNORECASE,
)
#: The default key format of djangorestframework-api-key.
_OF_DJANGO = re.compile(rb"[0-9A-Za-z]{8}\.[0-9A-Za-z]{32}")
_A_DIGIT = re.compile(rb"[0-9]")
_SCHEMES: Final = (b"api-key", b"bearer", b"x-api-key", b"authorization")


class Scan(NamedTuple):
    """The keys in a text.

    `keys`: keys with a correct checksum, under any prefix. `agent_tokens`: agent tokens, whether or not their signatures
    are valid. `oauth_secrets`: access tokens, refresh tokens and client secrets with a correct checksum. `admin_tokens`:
    the number of tokens of the admin API. `incomplete`: the number of truncated keys and agent tokens. `foreign`: words
    that may be keys of other programs. `presented`: those that are certainly meant as keys, by position or because the
    text contains nothing else. `digests`: values that may be the SHA-256 of a key.
    """

    keys: list[SecretKey]
    agent_tokens: list[SecretKey]
    oauth_secrets: list[SecretKey]
    admin_tokens: int
    incomplete: int
    foreign: list[SecretKey]
    presented: list[SecretKey]
    digests: list[bytes]


def scan(text: bytes, key_format: KeyFormat) -> Scan:
    """Find the keys in a text. Raises ValueError if it exceeds TEXT_BYTES_MAX."""
    if len(text) > TEXT_BYTES_MAX:
        raise ValueError(TOO_LONG)
    readings = _readings(text)
    whole = dict(found for reading in readings for found in _whole_keys(reading))
    tokens = dict.fromkeys(_whole_tokens(readings))
    ours = (*whole, *tokens)
    incomplete = _incomplete(readings[0], key_format, whole) + _incomplete_tokens(readings[0], tokens)
    accepts = [word for word in _words(readings[:2]) if word not in whole and key_format.may_exist(word)]
    digests = dict.fromkeys(match[0].lower() for match in _HEX_DIGEST.finditer(readings[0]))
    meant = {match[1].rstrip(_ROUND_WORDS) for match in _PRESENTED.finditer(readings[0]) if _A_DIGIT.search(match[1])}
    meant.update(word for word in accepts if _OF_DJANGO.fullmatch(word))
    only = readings[0].split()
    if len(only) == 1:
        meant.add(only[0].strip(b"\"'"))
    return Scan(
        keys=[SecretKey(found) for found, kind in whole.items() if kind != _ADMIN and kind not in _OF_OAUTH],
        agent_tokens=[SecretKey(found) for found in tokens],
        oauth_secrets=[SecretKey(found) for found, kind in whole.items() if kind in _OF_OAUTH],
        admin_tokens=sum(kind == _ADMIN for kind in whole.values()),
        incomplete=incomplete,
        foreign=[SecretKey(word) for word in accepts],
        presented=[
            SecretKey(word)
            for word in accepts
            if word in meant
            and word.lower() not in digests
            and b"//" not in word
            and not any(key in word for key in ours)
        ],
        digests=[bytes.fromhex(digest.decode("ascii")) for digest in digests],
    )


def as_text(text: bytes) -> str:
    """Decode text as UTF-8, or UTF-16 if it has a byte order mark: PowerShell, for one, redirects output in UTF-16."""
    is_wide = text[:2] in (b"\xff\xfe", b"\xfe\xff")
    return text.decode("utf-16" if is_wide else "utf-8", "replace").replace("\0", "")


def _readings(text: bytes) -> list[bytes]:
    """The text decoded, verbatim, and without any characters that may have been inserted into a key."""
    text = _COLOURS.sub(b"", as_text(text).encode("utf-8"))
    decoded = text
    for _ in range(_DECODINGS_MAX):
        before = decoded
        decoded = unquote_to_bytes(decoded)
        decoded = _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), decoded)
        decoded = _ENTITY.sub(lambda match: html.unescape(match[0].decode("ascii")).encode("utf-8"), decoded)
        if decoded == before:
            break
    unwrapped = _unwrapped(decoded, _NOT_OF_A_KEY)
    return list(dict.fromkeys([decoded, text, *unwrapped]))


def _unwrapped(decoded: bytes, inserted: re.Pattern[bytes]) -> list[bytes]:
    """The text without any characters that may have been inserted into a key."""
    return [inserted.sub(b"", one) for one in (_ESCAPED_SPACE.sub(b" ", decoded), decoded)]


def _whole_keys(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every key, token and secret with a correct checksum, and its kind, which is the mode of a key."""
    for mark in _MARK.finditer(text):
        run = text[mark.end() : mark.end() + _DIGITS]
        before = _BEFORE.search(text, max(0, mark.start() - _PREFIX_CHARACTERS_MAX), mark.start())
        if before is None or len(run) < _DIGITS or not _RUN.fullmatch(run):
            continue
        # The word before the mark may begin with something else, such as the n of a `\n` that was written out.
        for start in range(before.start(), mark.start()):
            prefix = text[start : mark.start()]
            candidate = text[start : mark.end()] + run
            if _PREFIX.fullmatch(prefix) and KeyFormat.has_right_checksum(candidate):
                yield candidate, mark[1]
                break


def _whole_tokens(readings: list[bytes]) -> Iterator[bytes]:
    """Every agent token, also one that was wrapped."""
    for reading in (*readings[:2], *_unwrapped(readings[0], _NOT_OF_A_TOKEN)):
        yield from agent_token_format.whole_tokens(reading)


def _incomplete_tokens(text: bytes, whole: Iterable[bytes]) -> int:
    """The number of distinct truncated agent tokens."""
    tokens = sorted(whole)
    words = set(agent_token_format.truncated_tokens(text))
    return sum(not _begins_one_of(word, tokens) for word in words)


def _incomplete(text: bytes, key_format: KeyFormat, whole: Iterable[bytes]) -> int:
    """The number of distinct truncated keys."""
    keys = sorted(whole)
    starts = set()
    for match in key_format.starts(text):
        run = _RUN.match(text, match.end())
        if run is not None and run[0]:
            # Characters after a whole key are not part of it.
            starts.add((match[0] + run[0])[: len(match[0]) + _DIGITS])
    return sum(not _begins_one_of(start, keys) for start in starts)


def _begins_one_of(start: bytes, keys: list[bytes]) -> bool:
    place = bisect.bisect_left(keys, start)
    return place < len(keys) and keys[place].startswith(start)


def _words(readings: Iterable[bytes]) -> list[bytes]:
    """Every word that may be a key of another program, with and without the characters around it."""
    found: dict[bytes, None] = {}
    for word in (word for reading in readings for word in _BETWEEN_WORDS.split(reading)):
        for piece in (word, *_INSIDE_WORDS.split(word), *(word.partition(sign)[2] for sign in (b"=", b":"))):
            for bare in (piece, piece.strip(_ROUND_WORDS), piece.rstrip(b".,;:!?")):
                if _FOREIGN_BYTES_MIN <= len(bare) <= KEY_BYTES_MAX and bare.lower() not in _SCHEMES:
                    found[bare] = None
    return list(found)
