"""The instructions of earlier requests, by the bytes that they depend on: a system prompt comes with many requests."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.prompts import Instructions
from keyproxy.ai.scanning.request_parts import RequestParts

#: All are dropped at either bound: which ones come again is not known.
_KEPT_MAX: Final = 1_024
_KEPT_BYTES_MAX: Final = 1_048_576


class KnownInstructions:
    """The instructions of one route's requests, except where the scan does not show what they depend on."""

    __slots__ = ("_bytes", "_kept")

    def __init__(self) -> None:
        self._kept: Final[dict[bytes, Instructions]] = {}
        self._bytes = 0

    def __repr__(self) -> str:
        return f"KnownInstructions({len(self._kept)}, {self._bytes} bytes)"

    def find(self, parts: RequestParts) -> Instructions | None:
        """Those of an earlier request with the same bytes, None without one. `parts`: the scan of the body."""
        key = _key(parts)
        return None if key is None else self._kept.get(key)

    def add(self, parts: RequestParts, instructions: Instructions) -> None:
        """Keep what was read of a request for later ones."""
        key = _key(parts)
        if key is None:
            return
        if len(self._kept) >= _KEPT_MAX or self._bytes + len(key) > _KEPT_BYTES_MAX:
            self._kept.clear()
            self._bytes = 0
        self._kept[key] = instructions
        self._bytes += len(key)


def _key(parts: RequestParts) -> bytes | None:
    spans = parts.instructions
    # Numbers in arrays are skipped in groups.
    if spans is None or not spans.is_usual or not parts.is_object or parts.array_numbers:
        return None
    return spans.key()
