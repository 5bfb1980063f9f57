"""Read the usage that a JSON document reports, as it passes.

A small document is kept (its pieces themselves, not a copy) and parsed at its end, which is fastest; a larger one is
scanned, which needs almost no memory. Both find the same usage, and the scanner also reads a truncated document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import orjson

from keyproxy.ai.responses.json_usage_scanner import UsageScanner
from keyproxy.ai.responses.meter import Meter
from keyproxy.model import TokenUse

#: A document up to this size is kept.
KEPT_BYTES_MAX: Final = 65_536

#: The overhead of a kept piece: an upstream may send single bytes.
_PIECE_BYTES: Final = 64


class JsonMeter(Meter):
    """For a response that is one JSON document."""

    def __init__(self, read: Callable[[object], TokenUse | None]) -> None:
        super().__init__()
        self._read = read
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._scanner: UsageScanner | None = None

    def feed(self, content: bytes) -> bytes:
        """See Meter."""
        if self._scanner is not None:
            self._scanner.feed(content)
            return content
        self._kept.append(content)
        self._kept_bytes += len(content) + _PIECE_BYTES
        if self._kept_bytes > KEPT_BYTES_MAX:
            self._scanned(b"".join(self._kept))
        return content

    def finish(self) -> bytes:
        """See Meter."""
        if self._scanner is None:
            document = b"".join(self._kept)
            if b'"usage"' not in document:
                return b""
            try:
                parsed = orjson.loads(document.removeprefix(b"\xef\xbb\xbf"))
            except ValueError:
                self._scanned(document)  # perhaps truncated after its usage
            else:
                self._said = self._read(parsed.get("usage")) if isinstance(parsed, dict) else None
        if self._scanner is not None:
            self._said = self._read(self._scanner.usage)
        return b""

    def _scanned(self, content: bytes) -> None:
        self._kept.clear()
        self._scanner = UsageScanner()
        self._scanner.feed(content)
