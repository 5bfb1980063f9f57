"""Where a body ends: by count, by chunks, or with the connection. Sans-IO.

Each body takes the bytes that follow a head, and returns their content, and the bytes after its end. Only content is
relayed; the other side is framed separately. The chunked reader accepts what RFC 9112 section 7.1
allows and nothing that servers are known to read differently: no bare LF, no space around a size, no sign, no `0x`, no
size beyond 16 digits; extensions and trailers are read, bounded, and dropped.

Precedents: CVE-2023-39326 (endless extensions), CVE-2025-22871 (a bare LF after a size), the TERM.EXT and EXT.TERM
families of 2025.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Protocol

#: The maximum size of all chunk extensions of one body together; and of all its trailer fields.
EXTENSION_BYTES_MAX: Final = 16_384
TRAILER_BYTES_MAX: Final = 16_384

#: Beyond this the counters of some servers wrap around or lose digits (CVE-2013-2028); no body is that long.
CHUNK_BYTES_MAX: Final = 1 << 53

_SIZE_LINE_BYTES_MAX: Final = EXTENSION_BYTES_MAX + 16
_CRLF: Final = b"\r\n"

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_QUOTED: Final = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_SIZE_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*)" % (_TOKEN, _TOKEN, _QUOTED)
)
#: The beginning of a chunk that has content and no extension.
_PLAIN_CHUNK = re.compile(rb"0{0,8}([1-9A-Fa-f][0-9A-Fa-f]{0,6})\r\n")
_TRAILER = re.compile(rb"(%b):[\t \x21-\x7e\x80-\xff]*" % _TOKEN)


class FramingError(Exception):
    """The bytes are not a body of the announced kind. The message has the reason, and none of the bytes."""


class Body(Protocol):
    """A body being read. `is_complete` once its end has been seen; `remaining_bytes` of content are known to come."""

    is_complete: bool
    remaining_bytes: int

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return (content, bytes after the end of the body). Raises FramingError."""
        ...

    def ends_with_connection(self) -> bool:
        """Return whether the body is complete, now that the connection has ended."""
        ...


class NoBody:
    """A message that ends with its head."""

    is_complete = True
    remaining_bytes = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        return b"", data

    def ends_with_connection(self) -> bool:
        return True


class CountedBody:
    """A body with a Content-Length."""

    __slots__ = ("is_complete", "remaining_bytes")

    def __init__(self, content_length: int) -> None:
        self.remaining_bytes = content_length
        self.is_complete = content_length == 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        remaining = self.remaining_bytes - len(data)
        if remaining > 0:
            self.remaining_bytes = remaining
            return data, b""
        end, self.remaining_bytes = self.remaining_bytes, 0
        self.is_complete = True
        return (data, b"") if remaining == 0 else (data[:end], data[end:])

    def ends_with_connection(self) -> bool:
        return self.is_complete


class EndlessBody:
    """A body that ends with the connection: a response without a length, and both directions of a tunnel."""

    is_complete = False
    remaining_bytes = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        return data, b""

    def ends_with_connection(self) -> bool:
        return True


class ChunkedBody:
    """A chunked body, each chunk checked; `forbids`: trailer fields that make the whole message malformed."""

    __slots__ = (
        "_at",
        "_buffer",
        "_extension_bytes",
        "_forbids",
        "_read",
        "_trailer_bytes",
        "is_complete",
        "remaining_bytes",
    )

    def __init__(self, forbids: Callable[[bytes], bool]) -> None:
        self.is_complete = False
        self._forbids = forbids
        self._buffer = b""
        self._at = 0
        self.remaining_bytes = 0
        self._extension_bytes = 0
        self._trailer_bytes = 0
        self._read: Callable[[list[bytes]], bool] = self._read_size

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        self._buffer = self._buffer + data if self._buffer else data
        # An offset moves through the buffer: cutting it after each of many small chunks would be quadratic.
        self._at = 0
        content: list[bytes] = []
        self._read_plain(content)
        while not self.is_complete and self._read(content):
            self._read_plain(content)
        left = self._buffer[self._at :]
        self._buffer = b"" if self.is_complete else left
        return content[0] if len(content) == 1 else b"".join(content), left if self.is_complete else b""

    def ends_with_connection(self) -> bool:
        return self.is_complete

    def _read_plain(self, content: list[bytes]) -> None:
        """Read whole chunks without extensions: a body of single bytes has tens of thousands of them in one piece."""
        if self._read != self._read_size:
            return
        buffer, at = self._buffer, self._at
        while match := _PLAIN_CHUNK.match(buffer, at):
            start = match.end()
            end = start + int(match[1], 16)
            if not buffer.startswith(_CRLF, end):
                break
            content.append(buffer[start:end])
            at = end + 2
        self._at = at

    def _line(self, bytes_max: int) -> bytes | None:
        """Return the next line without its CRLF; None if it is incomplete."""
        end = self._buffer.find(_CRLF, self._at)
        have = self._buffer[self._at : end if end >= 0 else None].removesuffix(b"\r")
        if len(have) > bytes_max:
            raise FramingError("a line of a chunked body is too long")
        if end < 0:
            # A bare LF or CR will never become a CRLF; only a CR at the very end still may.
            if b"\n" in have or b"\r" in have:
                raise FramingError("a line of a chunked body ends in something other than CRLF")
            return None
        line = self._buffer[self._at : end]
        self._at = end + 2
        return line

    def _read_size(self, _content: list[bytes]) -> bool:
        line = self._line(_SIZE_LINE_BYTES_MAX)
        if line is None:
            return False
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise FramingError("a chunk size is malformed")
        self._extension_bytes += len(match[2])
        if self._extension_bytes > EXTENSION_BYTES_MAX:
            raise FramingError("the chunk extensions are too long")
        size = int(match[1], 16)
        if size > CHUNK_BYTES_MAX:
            raise FramingError("a chunk has more bytes than any body")
        self.remaining_bytes = size
        self._read = self._read_content if self.remaining_bytes else self._read_trailer
        return True

    def _read_content(self, content: list[bytes]) -> bool:
        have = len(self._buffer) - self._at
        if have < self.remaining_bytes:
            if have:
                content.append(self._buffer[self._at :])
                self.remaining_bytes -= have
                self._at += have
            return False
        end = self._at + self.remaining_bytes
        content.append(self._buffer[self._at : end])
        self._at = end
        self._read = self._read_content_end
        return True

    def _read_content_end(self, _content: list[bytes]) -> bool:
        end = self._buffer[self._at : self._at + 2]
        if not _CRLF.startswith(end):
            raise FramingError("the length of a chunk differs from its size")
        if len(end) < len(_CRLF):
            return False
        self._at += 2
        self._read = self._read_size
        return True

    def _read_trailer(self, _content: list[bytes]) -> bool:
        line = self._line(TRAILER_BYTES_MAX)
        if line is None:
            return False
        if not line:
            self.is_complete = True
            return True
        self._trailer_bytes += len(line)
        match = _TRAILER.fullmatch(line)
        if match is None or self._trailer_bytes > TRAILER_BYTES_MAX or self._forbids(match[1]):
            raise FramingError("a trailer is malformed, too long, or names a field that must not be one")
        return True


def chunk(content: bytes) -> bytes:
    """Content as one chunk. `content` is not empty: an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(content), content)


LAST_CHUNK: Final = b"0\r\n\r\n"

#: May be sent ahead of any chunk, also of the last one: their sizes may have leading zeros. RFC 9112 section 7.1.
CHUNK_BEGINNING: Final = b"0"


def chunks(content: bytes, *, is_last: bool) -> bytes:
    """Content as one chunk, or as none if it is empty; `is_last`: followed by the last chunk."""
    return (chunk(content) if content else b"") + (LAST_CHUNK if is_last else b"")
