"""Read a stream of JSON documents, each on a line of its own (NDJSON), as they pass.

Lines are passed on whole, so that a stream can be ended between two. An unfinished one is held back up to
`EVENT_BYTES_MAX`, which is the memory of a stream; a longer one passes unread.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import StreamFormat
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.streams.stream_reading import EVENT_BYTES_MAX, StreamReading

#: The most lines of one piece that are read one by one; of the others, only the text is counted. And the most searches
#: of all following lines for one that must be parsed.
_LINES_MAX: Final = 1_024
_TRIES_MAX: Final = 16


class LineMeter(Meter):
    """For a response that is a stream of lines."""

    def __init__(self, reading: StreamReading) -> None:
        super().__init__(reading.usage)
        self.format = StreamFormat.NDJSON
        self._reading: Final = reading
        self._line = bytearray()
        #: The unfinished line was too long, and its beginning has been passed on.
        self._is_oversize = False

    @property
    def produced(self) -> int:
        return self._reading.tokens

    @property
    def produced_bound(self) -> int:
        return self._reading.bound

    def feed(self, content: bytes) -> bytes:
        before = b""
        if self._is_oversize:
            end = content.find(b"\n") + 1
            before, content = (content[:end], content[end:]) if end else (content, b"")
            self._reading.produced.add_unread(len(before))
            self._is_oversize = not end
        end = content.rfind(b"\n") + 1
        if not end:
            self._line += content
            return before + self._pass_oversize()
        lines = bytes(self._line) + content[:end] if self._line else content[:end]
        self._line.clear()
        self._line += content[end:]
        self._read(lines)
        rest = self._pass_oversize()
        return before + lines + rest if before or rest else lines

    def finish(self) -> bytes:
        """See Meter. The last line may have no end."""
        rest = bytes(self._line)
        self._line.clear()
        if rest:
            self._read(rest)
        return rest

    def cut(self, event: bytes, *, exception: str = "") -> bytes:
        self._line.clear()
        return (b"\n" if self._is_oversize else b"") + event + b"\n"

    def _pass_oversize(self) -> bytes:
        if len(self._line) <= EVENT_BYTES_MAX:
            return b""
        out = bytes(self._line)
        self._reading.produced.add_unread(len(out))
        self._is_oversize = True
        self._line.clear()
        return out

    def _read(self, lines: bytes) -> None:
        """Read whole lines: together, as far as none must be parsed, else each for itself."""
        reading = self._reading
        at = tries = 0
        for _ in range(_LINES_MAX):
            if at == len(lines):
                return
            if reading.has_begun and tries < _TRIES_MAX:
                tries += 1
                notable = reading.notable(lines, at)
                plain = len(lines) if notable < 0 else max(at, lines.rfind(b"\n", at, notable) + 1)
                reading.count(lines, at, plain)
                at = plain
            end = lines.find(b"\n", at) + 1 or len(lines)
            line = lines[at:end]
            reading.count(line, 0, len(line))
            if not reading.has_begun or reading.notable(line) >= 0:
                reading.read(line)
            at = end
        reading.count(lines, at, len(lines))
