"""Read a response in gzip or deflate: another meter gets the inflated content, the client the bytes unchanged.

Inflated content is scanned in pieces and dropped, so the memory is zlib's window and one piece. Each call inflates
at most `INFLATED_BYTES_MAX`; the rest waits, compressed, for the next call. Content that waits in a queue
of more than `WAITING_BYTES_MAX`, or is still waiting when the response has ended and the last call is over, is read no
further: it is a bomb, or as expensive to read as one. The same applies to content that zlib rejects. Usage reported
before that counts; without a report, what was not read is estimated by its compressed bytes.
"""

from __future__ import annotations

import zlib
from typing import Final

from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.produced_text import unread_tokens

INFLATED_BYTES_MAX: Final = 262_144
WAITING_BYTES_MAX: Final = 1_048_576

_PIECE_BYTES: Final = 65_536
#: The most gzip members in a row; a bomb may consist of thousands of empty ones.
_MEMBERS_MAX: Final = 100


class InflatingMeter(Meter):
    """For a response in gzip or deflate: another meter gets the inflated content, the client the bytes unchanged."""

    def __init__(self, inner: Meter, *, is_gzip: bool) -> None:
        super().__init__(inner.usage)
        self._inner = inner
        self._is_gzip = is_gzip
        self._inflate: zlib._Decompress | None = None
        self._members = 0
        self._left = b""
        self._is_readable = True
        self._unread = 0

    @property
    def produced(self) -> int:
        return self._inner.produced + unread_tokens(self._unread)

    @property
    def produced_bound(self) -> int:
        return self._inner.produced_bound + unread_tokens(self._unread)

    def feed(self, content: bytes) -> bytes:
        self._left = self._left + content if self._left else content
        if self._is_readable:
            self._read()
            self._is_readable = self._is_readable and len(self._left) <= WAITING_BYTES_MAX
        if not self._is_readable:
            self._drop()
        return content

    def finish(self) -> bytes:
        if self._left:
            self._read()
        self._drop()
        self._inner.finish()
        return b""

    def _drop(self) -> None:
        self._unread += len(self._left)
        self._left = b""

    def _read(self) -> None:
        budget = INFLATED_BYTES_MAX
        left = self._left
        while left and self._is_readable and budget > 0:
            if self._inflate is None:
                self._inflate = zlib.decompressobj(wbits=window_bits(left, is_gzip=self._is_gzip))
            try:
                piece = self._inflate.decompress(left, _PIECE_BYTES)
            except zlib.error:
                self._is_readable = False
                break
            self._inner.feed(piece)
            left = self._inflate.unconsumed_tail
            if self._inflate.eof:
                left, self._inflate = self._inflate.unused_data, None
                self._members += 1
            budget -= len(piece)
            self._is_readable = self._members < _MEMBERS_MAX
        self._left = left


def window_bits(content: bytes, *, is_gzip: bool) -> int:
    """Return zlib's number for the format of non-empty compressed bytes.

    "deflate" means the zlib format, RFC 9110 section 8.4.1.2; some servers send the raw format.
    """
    if is_gzip:
        return 16 + zlib.MAX_WBITS
    is_zlib = content[0] & 0x0F == zlib.DEFLATED and content[0] >> 4 <= 7
    return zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS
