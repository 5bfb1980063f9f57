"""What the approver of a call sees of it: a JSON object without secrets, of bounded size.

Longer content is cut: first long strings, evenly, then the end. The store keeps the object as `jsonb`, so it is
written as PostgreSQL prints it. A number that PostgreSQL would print in hundreds of digits, or a reader would round, is
a string.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

import orjson

from keyproxy.ai.scanning.json_grammar import PLAIN, STRING
from keyproxy.ai.tools.tool import Tool
from keyproxy.http_messages import RequestHead
from keyproxy.model import Identity

#: The summary in the store, which adds the hint of the key.
SUMMARY_BYTES_MAX: Final = 8_192
_ADDED_BYTES: Final = 256

_MASKED: Final = "[masked]"
_PATH_CHARACTERS_MAX: Final = 1_024
_QUERY_CHARACTERS_MAX: Final = 1_536
_TYPE_CHARACTERS_MAX: Final = 128

#: The longest string shown, from the first attempt to the last.
_STRING_CHARACTERS: Final = (SUMMARY_BYTES_MAX, 1_024, 256, 64)

#: A masked value with more brackets is not skipped, but cuts the summary off: skipping it would take too long.
_SKIPPED_MAX: Final = 20_000

#: What PostgreSQL may print of a number with an exponent of two digits.
_EXPANDED_BYTES: Final = 100
_NUMBER_BYTES_MAX: Final = 64
#: A floating-point number keeps 15 digits of any number; of more digits it may be rounded.
_EXACT_DIGITS: Final = 15

_SECRET_NAME: Final = re.compile(
    r"password|passwd|passphrase|secret|token|authorization|apikey|credential|privatekey|accesskey"
)
_COUNT_NAME: Final = re.compile(r"tokens\Z")
_SEPARATORS: Final = re.compile(r"[^a-z0-9]+")
_LONG_EXPONENT: Final = re.compile(rb"[eE][-+]?[0-9]{3}")
_UP_TO_BRACKET: Final = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)

_QUOTE: Final = 0x22
_OPEN_ARRAY: Final = 0x5B
_OPEN_OBJECT: Final = 0x7B
_CLOSE_ARRAY: Final = 0x5D
_CLOSE_OBJECT: Final = 0x7D
_COMMA: Final = 0x2C

#: What a value takes at least: "[masked]", or a number of which "…" is shown; and what an empty object takes.
_VALUE_BYTES: Final = 16
_BRACKETS_BYTES: Final = 2

#: The members of a pair, such as a header in a list of headers.
_PAIR_NAMES: Final = ("name", "key", "header")
_PAIR_VALUE: Final = "value"

HoldsKey = Callable[[bytes], bool]


class CalledWith(NamedTuple):
    """What a call sends. `arguments`: in canonical JSON; None: the body has another media type, or is malformed."""

    body: bytes
    media_type: bytes
    arguments: bytes | None


def call_summary(
    identity: Identity, tool: Tool, head: RequestHead, sent: CalledWith, *, digest: bytes, client: str | None,
    holds_key: HoldsKey,
) -> bytes:  # fmt: skip
    """The summary of a call, as JSON. `holds_key`: whether a text contains a credential."""
    agent = identity.agent_token
    path, _, query = head.line.target.partition(b"?")
    shown: dict[str, object] = {
        "tool": tool.name,
        "kind": tool.approval,
        "user": identity.user_id,
        "tenant": identity.tenant_id,
        "agent": None if agent is None else agent.agents[0],
        "is_test": identity.is_test,
        "client": client,
        "method": head.line.method.decode("latin-1"),
        "path": _MASKED if holds_key(path) else _shortened(path.decode("latin-1"), _PATH_CHARACTERS_MAX),
        "query": _shortened(_masked_query(query, holds_key), _QUERY_CHARACTERS_MAX),
        "body_bytes": len(sent.body),
        "digest": digest.hex(),
    }
    if identity.actor_user_id is not None:
        shown["actor"] = identity.actor_user_id
    is_cut = len(path) > _PATH_CHARACTERS_MAX or len(query) > _QUERY_CHARACTERS_MAX
    if sent.arguments is None:
        shown["media_type"] = _MASKED if holds_key(sent.media_type) else _media_type(sent.media_type)
        shown["body_sha256"] = hashlib.sha256(sent.body).hexdigest()
        return _text({**shown, "truncated": is_cut}).encode("utf-8")
    before = _text(shown)[:-1]
    bytes_max = SUMMARY_BYTES_MAX - _ADDED_BYTES - len(before.encode("utf-8"))
    arguments = _written(sent.arguments, bytes_max, holds_key)
    is_cut = is_cut or arguments.is_cut
    return f'{before}, "arguments": {arguments.text}, "truncated": {"true" if is_cut else "false"}}}'.encode()


def is_secret_name(name: str) -> bool:
    """Whether a member or parameter of this name may hold a secret: "api_key", "clientSecret", "X-Auth-Token"."""
    return _SECRET_NAME.search(_SEPARATORS.sub("", name.lower())) is not None


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shortened(text: str, characters_max: int) -> str:
    text = text.replace("\0", "\\u0000")
    return text if len(text) <= characters_max else f"{text[:characters_max]}…"


def _media_type(value: bytes) -> str:
    return _shortened(value.decode("latin-1"), _TYPE_CHARACTERS_MAX)


def _masked_query(query: bytes, holds_key: HoldsKey) -> str:
    """The query with the values masked that may be secret."""
    shown = []
    for parameter in query.split(b"&"):
        name, equals, value = parameter.partition(b"=")
        plain = unquote_to_bytes(parameter)
        if holds_key(parameter) or holds_key(plain):
            shown.append(_MASKED)
        elif value and is_secret_name(unquote_to_bytes(name).decode("utf-8", "replace")):
            shown.append(f"{name.decode('latin-1')}={_MASKED}")
        else:
            shown.append((name + equals + value).decode("latin-1"))
    return "&".join(shown)


def _is_rounded(number: str) -> bool:
    """Whether readers that use floating-point numbers for fractions and exponents would show another number."""
    if len(number) <= _EXACT_DIGITS or number.isdigit() or number[1:].isdigit():
        return False
    return Decimal(repr(float(number))) != Decimal(number)


class _Written(NamedTuple):
    text: str
    is_cut: bool


def _written(arguments: bytes, bytes_max: int, holds_key: HoldsKey) -> _Written:
    for characters in _STRING_CHARACTERS:
        writer = _ArgumentsWriter(arguments, bytes_max, characters, holds_key)
        writer.write()
        if not writer.is_full:
            break
    return _Written("".join(writer.parts), writer.is_cut or writer.is_full)


class _ArgumentsWriter:
    """Writes canonical JSON as it is shown, up to a size. `is_cut`: a string was cut; `is_full`: the end was."""

    def __init__(self, text: bytes, bytes_max: int, string_characters: int, holds_key: HoldsKey) -> None:
        self.parts: list[str] = []
        self.is_cut = False
        self.is_full = False
        self._text: Final = text
        self._string_characters: Final = string_characters
        self._holds_key: Final = holds_key
        self._bytes_left = bytes_max
        self._at = 0

    def write(self) -> None:
        """Write everything that fits."""
        self._write_value(is_secret=False)

    def _write_value(self, *, is_secret: bool) -> None:
        byte = self._text[self._at]
        if is_secret:
            self._skip()
            self._put(_text(_MASKED))
        elif byte == _QUOTE:
            self._write_string(self._string())
        elif byte == _OPEN_OBJECT:
            self._write_object()
        elif byte == _OPEN_ARRAY:
            self._write_array()
        else:
            self._write_plain()

    def _write_object(self) -> None:
        self._begin("{")
        names: set[str] = set()
        is_pair_of_secret = False
        while not self.is_full and self._text[self._at] != _CLOSE_OBJECT:
            self._skip_comma()
            name = self._string()
            self._at += 1
            shown = self._shown_name(name, names)
            if not self._put(f"{', ' if names else ''}{_text(shown)}: ", reserve=_VALUE_BYTES):
                break
            names.add(shown)
            is_secret = is_secret_name(name) and not (_COUNT_NAME.search(name.lower()) and self._is_plain())
            if name in _PAIR_NAMES and self._text[self._at] == _QUOTE:
                at = self._at
                is_pair_of_secret = is_secret_name(self._string())
                self._at = at
            self._write_value(is_secret=is_secret or (is_pair_of_secret and name == _PAIR_VALUE))
        self._end("}")

    def _write_array(self) -> None:
        self._begin("[")
        separator = ""
        while not self.is_full and self._text[self._at] != _CLOSE_ARRAY:
            self._skip_comma()
            if not self._put(separator, reserve=_VALUE_BYTES):
                break
            separator = ", "
            self._write_value(is_secret=False)
        self._end("]")

    def _begin(self, bracket: str) -> None:
        self._at += 1
        self.parts.append(bracket)
        self._bytes_left -= _BRACKETS_BYTES

    def _end(self, bracket: str) -> None:
        self._at += 1
        self.parts.append(bracket)

    def _write_string(self, text: str) -> None:
        shown = _MASKED if self._is_secret_text(text) else self._cut(text)
        written = _text(shown)
        while len(written.encode("utf-8")) > self._bytes_left:
            self.is_full = True
            shown = shown[: len(shown) // 2] if len(shown) > 1 else ""
            written = _text(f"{shown}…")
        self._put(written)

    def _write_plain(self) -> None:
        match = PLAIN.match(self._text, self._at)
        assert match is not None  # noqa: S101 - for the type checker: the text is canonical JSON
        self._at = match.end()
        number = match.group()
        if len(number) > _NUMBER_BYTES_MAX or _LONG_EXPONENT.search(number) or _is_rounded(number.decode("ascii")):
            self._write_string(number.decode("ascii"))
            return
        expanded = _EXPANDED_BYTES if b"e" in number or b"E" in number else 0
        if not self._put(number.decode("ascii"), reserve=expanded):
            self._put(_text("…"))
        self._bytes_left -= expanded

    def _put(self, text: str, *, reserve: int = 0) -> bool:
        """Write a piece if it fits and leaves `reserve` bytes; else nothing more will be written."""
        size = len(text.encode("utf-8"))
        if size + reserve > self._bytes_left:
            self.is_full = True
            return False
        self._bytes_left -= size
        self.parts.append(text)
        return True

    def _shown_name(self, name: str, names: set[str]) -> str:
        shown = _MASKED if self._is_secret_text(name) else self._cut(name)
        while shown in names:
            # Two names that differ only in what is not shown; of equal names the store would keep one.
            shown += "…"
        return shown

    def _cut(self, text: str) -> str:
        if len(text) > self._string_characters:
            self.is_cut = True
        return _shortened(text, self._string_characters)

    def _is_secret_text(self, text: str) -> bool:
        # Further characters are not shown.
        return self._holds_key(text[: 2 * SUMMARY_BYTES_MAX].encode("utf-8"))

    def _is_plain(self) -> bool:
        return self._text[self._at] not in (_QUOTE, _OPEN_OBJECT, _OPEN_ARRAY)

    def _string(self) -> str:
        """Read a string."""
        match = STRING.match(self._text, self._at)
        assert match is not None  # noqa: S101 - for the type checker: the text is canonical JSON
        self._at = match.end()
        return str(orjson.loads(match.group()))

    def _skip_comma(self) -> None:
        if self._text[self._at] == _COMMA:
            self._at += 1

    def _skip(self) -> None:
        """Skip a value."""
        if self._text[self._at] == _QUOTE or self._is_plain():
            match = STRING.match(self._text, self._at) or PLAIN.match(self._text, self._at)
            self._at = self._at if match is None else match.end()
            return
        depth = 0
        for _ in range(_SKIPPED_MAX):
            match = _UP_TO_BRACKET.match(self._text, self._at)
            self._at = self._at if match is None else match.end()
            depth += 1 if self._text[self._at] in (_OPEN_OBJECT, _OPEN_ARRAY) else -1
            self._at += 1
            if not depth:
                return
        self.is_full = True
