"""Inflate a request's content in portions, within bounds."""

from __future__ import annotations

import zlib
from typing import Final

from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.responses.inflating_meter import window_bits
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

_PIECE_BYTES: Final = 65_536

#: Up to this size any ratio is allowed: short JSON compresses well.
_RATIO_FREE_BYTES: Final = 65_536

_NOT_AS_ENCODED: Final = "The body does not match its Content-Encoding."
_ENDS_ELSEWHERE: Final = "The body is longer or shorter than its compressed content."


def compression_of(codings: tuple[bytes, ...], body: bytes) -> int | None:
    """zlib's number for the format of a body; None if it is not compressed. Raises a Refusal for another coding."""
    encodings = [coding for coding in codings if coding != b"identity"]
    if not encodings or not body:
        return None
    if len(encodings) > 1 or encodings[0] not in (b"gzip", b"x-gzip", b"deflate"):
        raise malformed("Content-Encoding must be identity, gzip or deflate on this route.")
    is_gzip = encodings[0] != b"deflate"
    if not is_gzip and body[0] & 0x0F == zlib.DEFLATED and _is_stored_block(body):
        raise malformed("The body is compressed in two formats at once.")
    return window_bits(body, is_gzip=is_gzip)


def _is_stored_block(body: bytes) -> bool:
    """Whether content in the zlib format is the raw format too, with other content, to a server that expects that.

    The first byte of zlib's header begins a stored block, whose length and its complement follow. RFC 1951 section 3.2.4.
    """
    return len(body) >= 5 and body[1] ^ body[3] == 0xFF and body[2] ^ body[4] == 0xFF


@mypyc_attr(allow_interpreted_subclasses=True)
class ContentMemory:
    """The memory that the inflated content of one request takes."""

    def hold(self, count: int) -> None:
        """The content has so many bytes now. Raises a Refusal if there is no memory for more; 0 releases it."""
        raise NotImplementedError


class Inflation:
    """Inflates a body; `content` is set once `advance` has returned True."""

    def __init__(
        self, body: bytes, bits: int, *, bytes_max: int, ratio_max: int, memory: ContentMemory | None = None
    ) -> None:
        self.content = b""
        self._memory: Final = memory
        self._body: Final = body
        self._inflate: Final = zlib.decompressobj(wbits=bits)
        self._bytes_max: Final = min(bytes_max, max(_RATIO_FREE_BYTES, ratio_max * len(body)))
        self._at = 0
        self._left = b""
        self._out: list[bytes] = []
        self._out_bytes = 0

    def advance(self) -> bool:
        """Inflate the next piece; return whether it was the last. Raises a Refusal."""
        inflate = self._inflate
        is_fed = bool(self._left)
        if not is_fed:
            self._left = self._body[self._at : self._at + _PIECE_BYTES]
            self._at += len(self._left)
        was_empty = not self._left
        try:
            piece = inflate.decompress(self._left, _PIECE_BYTES)
        except zlib.error as error:
            raise malformed(_NOT_AS_ENCODED) from error
        self._left = inflate.unconsumed_tail
        self._out.append(piece)
        self._out_bytes += len(piece)
        if self._out_bytes > self._bytes_max:
            raise Refusal(Reason.BODY_TOO_LARGE, f"its content has more than {self._bytes_max} bytes")
        if self._memory is not None:
            self._memory.hold(self._out_bytes)
        if not inflate.eof:
            if was_empty and not piece:
                raise malformed(_ENDS_ELSEWHERE)
            return False
        if inflate.unused_data or self._at < len(self._body):
            raise malformed(_ENDS_ELSEWHERE)
        self.content = b"".join(self._out)
        self._out = []
        return True


class Deflation:
    """Compresses content that is replaced in parts; `body` is set once `advance` has returned True."""

    def __init__(self, pieces: list[memoryview], bits: int) -> None:
        self.body = b""
        self._pieces: Final = pieces
        self._deflate: Final = zlib.compressobj(level=1, wbits=bits)
        self._number = 0
        self._at = 0
        self._out: list[bytes] = []

    def advance(self) -> bool:
        """Compress the next piece; return whether it was the last."""
        if self._number < len(self._pieces):
            whole = self._pieces[self._number]
            piece = whole[self._at : self._at + _PIECE_BYTES]
            self._at += len(piece)
            if self._at >= len(whole):
                self._number += 1
                self._at = 0
            self._out.append(self._deflate.compress(piece))
            return False
        self._out.append(self._deflate.flush())
        self.body = b"".join(self._out)
        self._out = []
        return True
