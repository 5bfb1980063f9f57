"""Read the usage that a stream of server-sent events reports, as its events pass.

Lines may end in CR, LF or both, data may span lines, and comments and a byte order mark may occur.

Events are passed on whole, which delays nothing that a client could use, so that a stream can be ended between two. An
unfinished event is held back up to `HELD_BYTES_MAX`, and kept for reading up to `EVENT_BYTES_MAX`: that is the memory
of a stream. A longer one is scanned as it passes.
"""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.dialects.endpoint import StreamFormat
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.streams.stream_reading import EVENT_BYTES_MAX, StreamReading

HELD_BYTES_MAX: Final = 65_536

#: Two line ends, the longer spellings first: a CR LF is never taken for two.
_EVENT_END = re.compile(rb"\r\n\r\n|\r\n\r|\r\n\n|\r\r\n|\r\r|\n\r\n|\n\r|\n\n")
_EVENT_END_BYTES_MAX: Final = 4
_LINE_ENDS: Final = (b"\r", b"\n")

#: The most events of one piece that are read one by one; the rest of a longer piece passes unread. And the most checks
#: for whether all following events can be counted together.
_EVENTS_MAX: Final = 1_024
_TRIES_MAX: Final = 16


class SseMeter(Meter):
    """For a response that is a stream of server-sent events."""

    def __init__(self, reading: StreamReading, *, hides_usage: bool) -> None:
        super().__init__(reading.usage)
        self.format = StreamFormat.SSE
        self._reading: Final = reading
        self._hides_usage: Final = hides_usage
        self._event = bytearray()
        #: How much of the unfinished event was sent to the client, and whether it has become too long to be read.
        self._passed = 0
        self._is_oversize = False
        #: The last event ended in CR: a following LF is part of it, and is passed on or left out with it.
        self._awaits_lf = False
        self._has_hidden = False

    @property
    def produced(self) -> int:
        return self._reading.tokens

    @property
    def produced_bound(self) -> int:
        return self._reading.bound

    def feed(self, content: bytes) -> bytes:
        if self._event or self._awaits_lf or not self._reading.has_begun:
            return self._feed_apart(content)
        if self._reading.count_repeated(content):
            return content
        plain = self._count_plain(content)
        if plain == len(content):
            self._reading.remember(content)
            return content
        return content[:plain] + self._feed_apart(content[plain:])

    def finish(self) -> bytes:
        """See Meter. Some upstreams do not end their last event."""
        rest = bytes(self._event)
        keeps = not rest or self._take(rest)
        out = rest[self._passed :] if keeps or self._passed else b""
        self._event.clear()
        self._passed = 0
        return out

    def cut(self, event: bytes, *, exception: str = "") -> bytes:
        begun, self._passed = self._passed, 0
        self._event.clear()
        return b"\n\n" + event if begun else event

    def _count_plain(self, content: bytes | bytearray) -> int:
        """Count the whole events at the beginning, up to one that must be parsed; return their length in bytes."""
        if not self._reading.has_begun:
            return 0
        notable = self._reading.notable(content)
        end = content.rfind(b"\n\n", 0, len(content) if notable < 0 else notable) + 2
        if end < 2:
            return 0
        if content[end - 3 : end - 2] in _LINE_ENDS and end > 2:
            # Of more than two line ends, those after the first two belong to the next event, which may be left out.
            first = _EVENT_END.match(content, len(content[:end].rstrip(b"\r\n")))
            end = end if first is None else first.end()
        self._reading.count(content, 0, end)
        return end

    def _feed_apart(self, content: bytes) -> bytes:
        """Count event by event: where an event is unfinished, has a usage, or is the first."""
        out = []
        if self._awaits_lf and content:
            self._awaits_lf = False
            if content.startswith(b"\n"):
                out.append(b"" if self._has_hidden else b"\n")
                content = content[1:]
        event = self._event
        start = max(0, len(event) - _EVENT_END_BYTES_MAX + 1)
        event += content
        events = tries = 0
        while match := _EVENT_END.search(event, start):
            events += 1
            if events > _EVENTS_MAX:
                self._drop(out)
                break
            block = bytes(event[: match.end()])
            del event[: match.end()]
            self._has_hidden = not self._take(block) and not self._passed
            if not self._has_hidden:
                out.append(block[self._passed :])
            self._passed = start = 0
            self._is_oversize = False
            self._awaits_lf = not event and block.endswith(b"\r")
            if tries < _TRIES_MAX and not self._awaits_lf:
                plain = self._count_plain(event)
                out.append(bytes(event[:plain]))
                del event[:plain]
                tries += 0 if plain else 1
        if len(event) > EVENT_BYTES_MAX:
            self._pass_long(out)
        elif len(event) > HELD_BYTES_MAX:
            out.append(bytes(event[self._passed :]))
            self._passed = len(event)
        return b"".join(out)

    def _pass_long(self, out: list[bytes]) -> None:
        """Scan what has arrived of a long event, and pass it on; its end may lie in the bytes that are kept."""
        event = self._event
        out.append(bytes(event[self._passed :]))
        scanned = len(event) - _EVENT_END_BYTES_MAX + 1
        self._reading.feed_long(event, 0, scanned)
        del event[:scanned]
        self._passed = len(event)

    def _take(self, block: bytes) -> bool:
        """Take an event that has ended; return whether to send it to the client."""
        if self._reading.has_long or len(block) > EVENT_BYTES_MAX:
            self._reading.feed_long(block, 0, len(block))
            self._reading.end_long()
            return True
        return self._is_oversize or self._read(block)

    def _drop(self, out: list[bytes]) -> None:
        """Pass on what has arrived of the unfinished event, and any content after it, unread."""
        event = self._event
        out.append(bytes(event[self._passed :]))
        self._reading.produced.add_unread(max(0, len(event) - _EVENT_END_BYTES_MAX))
        rest = bytes(event[-_EVENT_END_BYTES_MAX:])
        start = 0
        while match := _EVENT_END.search(rest, start):
            start = match.end()
        event.clear()
        event += rest[start:]
        self._passed = len(event)
        self._is_oversize = bool(event)
        self._awaits_lf = not event and rest.endswith(b"\r")
        self._has_hidden = False

    def _read(self, block: bytes) -> bool:
        """Read one event; return whether to send it to the client."""
        reading = self._reading
        reading.count(block, 0, len(block))
        if reading.has_begun and reading.notable(block) < 0:
            return True
        event = reading.read(_data(block))
        return event is None or not (self._hides_usage and event.get("choices") == [])


def _data(block: bytes) -> bytes:
    """Return the data of an event: the values of its `data` lines, joined."""
    lines = block.removeprefix(b"\xef\xbb\xbf").splitlines()
    return b"\n".join([line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")])
