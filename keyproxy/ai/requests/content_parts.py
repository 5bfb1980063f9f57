"""The open arrays and objects while a request's JSON is read, and the parts of messages in them.

A part has a `type`, and may contain an image: as `image_url`, a text or an object with a `url`, or
as `source`, an object of type base64 with `data`.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

#: The names that make a part, by how they stand in the body.
PART_NAMES: Final = {name.encode(): name for name in ("type", "image_url", "source", "url", "data")}


def _spelt(character: str) -> bytes:
    """A pattern for a character as it is, or escaped: PHP and others escape each slash."""
    slash = rb"|\\/" if character == "/" else b""
    return rb"(?:%b|\\u(?i:%04x)%b)" % (re.escape(character.encode()), ord(character), slash)


#: How the URL of an image that is sent along begins, in a JSON text.
_DATA_URL: Final = re.compile(b"".join([_spelt(character) for character in "data:image/"]))


class Container:
    """An open array or object.

    `name`: the member that is being read, if its name matters. `count`: elements of an array that was asked for.
    `type`, `inline_bytes`, `url_bytes`, `data_bytes`: of an object that may be a part of a message, or within one. With
    several types (`types`) it is taken for the one among `media`, and for no image: readers take the first or the last.
    """

    __slots__ = (
        "count", "counts", "data_bytes", "inline_bytes", "is_empty", "is_object", "kept", "name", "start", "type",
        "types", "url_bytes",
    )  # fmt: skip

    def __init__(self, start: int, kept: dict[str, Any] | None, *, is_object: bool) -> None:
        self.start = start
        self.is_object = is_object
        self.kept = kept
        self.name = ""
        self.type = ""
        self.count = 0
        self.counts = False
        self.is_empty = True
        self.types = self.inline_bytes = self.url_bytes = self.data_bytes = 0

    def note(self, value: bytes, head: bytes, value_bytes: int, media: frozenset[str]) -> None:
        """A text is the value of the member that is being read: `value` if it is short, else empty; and its beginning."""
        name = self.name
        if name == "type":
            self.types += 1
            if value and self.type not in media:
                self.type = str(orjson.loads(b'"%b"' % value))
        elif name == "image_url":
            self.inline_bytes = value_bytes if _DATA_URL.match(head) else 0
        elif name == "url":
            self.url_bytes = value_bytes if _DATA_URL.match(head) else 0
        elif name == "data":
            self.data_bytes = value_bytes

    def note_object(self, value: Container) -> None:
        """An object is the value of the member that is being read, and has ended."""
        if self.name == "image_url":
            self.inline_bytes = value.url_bytes
        elif self.name == "source" and value.type == "base64" and value.types == 1:
            self.inline_bytes = self.inline_bytes or value.data_bytes
