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
from typing import Final

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
#: The most digits of a size that is read without a regular expression, and the value of each byte as a digit.
_PLAIN_DIGITS_MAX: Final = 8
_NO_DIGIT: Final = 16
_DIGITS: Final = bytes([int(chr(one), 16) if chr(one) in "0123456789abcdefABCDEF" else _NO_DIGIT for one in range(256)])
_TRAILER = re.compile(rb"(%b):[\t \x21-\x7e\x80-\xff]*" % _TOKEN)

#: The lines before small chunks, such as the events of a stream: to format one takes as long as the rest of a chunk.
_SIZE_LINES_MAX: Final = 1_024
_SIZE_LINES: Final[tuple[bytes, ...]] = tuple([b"%x\r\n" % size for size in range(_SIZE_LINES_MAX)])

#: The parts of a chunked body.
_AT_SIZE: Final = 0
_AT_CONTENT: Final = 1
_AT_CONTENT_END: Final = 2
_AT_TRAILER: Final = 3


class FramingError(Exception):
    """The bytes are not a body of the announced kind. The message has the reason, and none of the bytes."""


class Body:
    """A body being read. `is_complete` once its end has been seen; `remaining_bytes` of content are known to come.

    A base class, not a protocol: compiled code finds the methods of a protocol by name, which takes longer than they do.
    """

    __slots__ = ("is_complete", "remaining_bytes")

    is_complete: bool
    remaining_bytes: int

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return (content, bytes after the end of the body). Raises FramingError."""
        raise NotImplementedError

    def ends_with_connection(self) -> bool:
        """Return whether the body is complete, now that the connection has ended."""
        return self.is_complete


class EmptyBody(Body):
    """A message that ends with its head."""

    __slots__ = ()

    def __init__(self) -> None:
        self.is_complete = True
        self.remaining_bytes = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        return b"", data


class CountedBody(Body):
    """A body with a Content-Length."""

    __slots__ = ()

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


class EndlessBody(Body):
    """A body that ends with the connection: a response without a length, and both directions of a tunnel."""

    __slots__ = ()

    def __init__(self) -> None:
        self.is_complete = False
        self.remaining_bytes = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        return data, b""

    def ends_with_connection(self) -> bool:
        return True


class ChunkedBody(Body):
    """A chunked body, each chunk checked; `forbids`: trailer fields that make the whole message malformed."""

    __slots__ = ("_at", "_buffer", "_extension_bytes", "_forbids", "_next", "_trailer_bytes")

    def __init__(self, forbids: Callable[[bytes], bool]) -> None:
        self.is_complete = False
        self.remaining_bytes = 0
        self._forbids = forbids
        self._buffer = b""
        self._at = 0
        self._extension_bytes = 0
        self._trailer_bytes = 0
        #: The part that is read next. Not a bound method: that would be a cycle, which only the collector frees.
        self._next: int = _AT_SIZE

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        self._buffer = self._buffer + data if self._buffer else data
        # An offset moves through the buffer: cutting it after each of many small chunks would be quadratic.
        self._at = 0
        content: list[bytes] = []
        self._read_plain(content)
        while self._at < len(self._buffer) and not self.is_complete and self._read(content):
            self._read_plain(content)
        left = self._buffer[self._at :]
        self._buffer = b"" if self.is_complete else left
        return content[0] if len(content) == 1 else b"".join(content), left if self.is_complete else b""

    def _read_plain(self, content: list[bytes]) -> None:
        """Read whole chunks without extensions: a body of single bytes has tens of thousands of them in one piece.

        Digit by digit, which takes a fifth of a regular expression and `int`: a stream has a chunk for each token.
        """
        if self._next != _AT_SIZE:
            return
        buffer, at = self._buffer, self._at
        count = len(buffer)
        while at < count:
            size, place, last = 0, at, min(count, at + _PLAIN_DIGITS_MAX)
            while place < last:
                digit = _DIGITS[buffer[place]]
                if digit == _NO_DIGIT:
                    break
                size = size * 16 + digit
                place += 1
            start = place + 2
            end = start + size
            if not size or end + 2 > count or not (_is_crlf(buffer, place) and _is_crlf(buffer, end)):
                break
            content.append(buffer[start:end])
            at = end + 2
        self._at = at

    def _read(self, content: list[bytes]) -> bool:
        """Read the next part as far as it has arrived. False: it is incomplete."""
        if self._next == _AT_SIZE:
            return self._read_size()
        if self._next == _AT_CONTENT:
            return self._read_content(content)
        return self._read_content_end() if self._next == _AT_CONTENT_END else self._read_trailer()

    def _line(self, bytes_max: int) -> bytes | None:
        """Return the next line without its CRLF; None if it is incomplete."""
        end = self._buffer.find(_CRLF, self._at)
        have = self._buffer[self._at : end if end >= 0 else None].removesuffix(b"\r")
        if len(have) > bytes_max:
            raise FramingError("a line of a chunked body is too long")
        if end < 0:
            # A bare LF or CR will never become a CRLF; only a CR at the very end still may.
            if have.find(b"\n") >= 0 or have.find(b"\r") >= 0:
                raise FramingError("a line of a chunked body ends in something other than CRLF")
            return None
        line = self._buffer[self._at : end]
        self._at = end + 2
        return line

    def _read_size(self) -> bool:
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
        self._next = _AT_CONTENT if size else _AT_TRAILER
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
        self.remaining_bytes = 0
        self._next = _AT_CONTENT_END
        return True

    def _read_content_end(self) -> bool:
        end = self._buffer[self._at : self._at + 2]
        if not _CRLF.startswith(end):
            raise FramingError("the length of a chunk differs from its size")
        if len(end) < len(_CRLF):
            return False
        self._at += 2
        self._next = _AT_SIZE
        return True

    def _read_trailer(self) -> bool:
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


def _is_crlf(buffer: bytes, at: int) -> bool:
    return buffer[at] == 13 and buffer[at + 1] == 10


def chunk(content: bytes) -> bytes:
    """Content as one chunk. `content` is not empty: an empty chunk would end the body."""
    size = len(content)
    return (_SIZE_LINES[size] if size < _SIZE_LINES_MAX else b"%x\r\n" % size) + content + _CRLF


LAST_CHUNK: Final = b"0\r\n\r\n"

#: May be sent ahead of any chunk, also of the last one: their sizes may have leading zeros. RFC 9112 section 7.1.
CHUNK_BEGINNING: Final = b"0"


def chunks(content: bytes, *, is_last: bool) -> bytes:
    """Content as one chunk, or as none if it is empty; `is_last`: followed by the last chunk."""
    some = chunk(content) if content else b""
    return some + LAST_CHUNK if is_last else some
