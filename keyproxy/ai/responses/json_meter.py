"""Read the usage that a JSON document reports, as it passes.

A small document is kept (its pieces themselves, not a copy) and parsed at its end, which is fastest; a larger one is
scanned, which needs almost no memory. Both find the same usage, and the scanner also reads a truncated document.
"""

from __future__ import annotations

from typing import Final

import orjson

from keyproxy.ai.dialects.endpoint import Dialect, DialectEndpoint, EndpointClass
from keyproxy.ai.responses.json_members import MemberScanner
from keyproxy.ai.responses.json_strings import StringCounter
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.usage_reader import ResponseUsageReader, outermost_members

#: A document up to this size is kept.
KEPT_BYTES_MAX: Final = 65_536

#: The overhead of a kept piece: an upstream may send single bytes.
_PIECE_BYTES: Final = 64

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_MARK_BEGINS: Final = 0xEF


class JsonMeter(Meter):
    """For a response that is one JSON document."""

    def __init__(self, dialect: Dialect, endpoint: DialectEndpoint, usage: ResponseUsageReader) -> None:
        super().__init__(usage)
        self._dialect: Final = dialect
        self._endpoint: Final = endpoint
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._members: MemberScanner | None = None
        self._strings: StringCounter | None = None
        self._counts_strings: Final = endpoint.kind not in (EndpointClass.READS, EndpointClass.NONE)

    @property
    def produced(self) -> int:
        """See Meter. The strings of the document."""
        if not self._counts_strings:
            return 0
        strings = self._strings
        if strings is None:
            strings = StringCounter()
            for content in self._kept:
                strings.feed(content)
        return strings.tokens

    @property
    def produced_bound(self) -> int:
        return self.produced

    def feed(self, content: bytes) -> bytes:
        if self._members is not None:
            self._scan(self._members, content)
            return content
        self._kept.append(content)
        self._kept_bytes += len(content) + _PIECE_BYTES
        if self._kept_bytes > KEPT_BYTES_MAX:
            document = b"".join(self._kept)
            self._kept.clear()
            if self._counts_strings:
                self._strings = StringCounter()
            self._members = MemberScanner(outermost_members(self._dialect, self._endpoint))
            self._scan(self._members, document)
        return content

    def finish(self) -> bytes:
        members = self._members
        if members is None:
            document = self._kept[0] if len(self._kept) == 1 else b"".join(self._kept)
            self._kept = [document]
            try:
                has_mark = bool(document) and document[0] == _MARK_BEGINS
                parsed = orjson.loads(document.removeprefix(_BYTE_ORDER_MARK) if has_mark else document)
            except ValueError:
                members = MemberScanner(outermost_members(self._dialect, self._endpoint))
                members.feed(document)  # perhaps truncated after its usage
            else:
                if isinstance(parsed, dict):
                    self.usage.read_document(parsed)
        if members is not None:
            self.usage.read_document(members.found)
        return b""

    def _scan(self, members: MemberScanner, content: bytes) -> None:
        members.feed(content)
        if self._strings is not None:
            self._strings.feed(content)
