"""Request a stream's usage from the upstream on the client's behalf, by editing the bytes of the request.

The edit inserts `include_usage` and leaves all other bytes as the client sent them. Serialising the document again
would change numbers beyond a double's range, the escapes in strings, and the order of duplicate names.
"""

from __future__ import annotations

import json
import re
from typing import Final

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER: Final = json.JSONDecoder()


def with_usage(content: bytes, *, has_options: bool) -> bytes:
    """Return the request with `stream_options.include_usage` set to true.

    `content` is a well-formed, non-empty JSON object. `has_options`: it has `stream_options` once, an object or null.
    Raises RecursionError if the members before it are nested too deeply to be read.
    """
    text = content.decode("utf-8")
    opening = text.index("{")
    options = _member(text, opening, "stream_options") if has_options else None
    if options is None:
        return _put(text, opening + 1, opening + 1, '"stream_options":{"include_usage":true},')
    start, end = options
    if text[start] != "{":
        return _put(text, start, end, '{"include_usage":true}')
    asked = _member(text, start, "include_usage")
    if asked is not None:
        return _put(text, *asked, "true")
    comma = "" if text.startswith("}", _behind_space(text, start + 1)) else ","
    return _put(text, start + 1, start + 1, f'"include_usage":true{comma}')


def _put(text: str, start: int, end: int, new: str) -> bytes:
    return (text[:start] + new + text[end:]).encode("utf-8")


def _member(text: str, opening: int, name: str) -> tuple[int, int] | None:
    """Return where a member's value begins and ends, in the object that opens here; None if there is no such member."""
    at = _behind_space(text, opening + 1)
    while text[at] == '"':
        key, at = _DECODER.raw_decode(text, at)
        start = _behind_space(text, _behind_space(text, at) + 1)  # behind the colon
        _, end = _DECODER.raw_decode(text, start)
        if key == name:
            return start, end
        at = _behind_space(text, end)
        if text[at] == ",":
            at = _behind_space(text, at + 1)
    return None


def _behind_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()
