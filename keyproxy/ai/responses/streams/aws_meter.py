"""Read a response that is an AWS event stream, as Bedrock's, as its messages pass.

Messages are passed on whole, so that a stream can be ended between two. An unfinished one is held back up to
`EVENT_BYTES_MAX`, which is the memory of a stream; a longer one passes unread. After bytes that are no message,
nothing is read: the next message could not be found.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import StreamFormat
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.streams.aws_event_stream import (
    PRELUDE_BYTES,
    FrameError,
    make_message,
    message_bytes,
    read_message,
)
from keyproxy.ai.responses.streams.stream_reading import EVENT_BYTES_MAX, StreamReading

#: The most messages of one piece that are read; the others pass unread.
_MESSAGES_MAX: Final = 4_096


class AwsMeter(Meter):
    """For a response that is an AWS event stream."""

    def __init__(self, reading: StreamReading) -> None:
        super().__init__(reading.usage)
        self.format = StreamFormat.AWS_EVENT_STREAM
        self._reading: Final = reading
        self._held = bytearray()
        #: The length of what is held once it can be read.
        self._needed = PRELUDE_BYTES
        #: How much of a message that is too long is still to be passed on.
        self._unread = 0
        self._is_broken = False

    @property
    def produced(self) -> int:
        return self._reading.tokens

    @property
    def produced_bound(self) -> int:
        return self._reading.bound

    def feed(self, content: bytes) -> bytes:
        if self._is_broken:
            self._reading.produced.add_unread(len(content))
            return content
        if self._held:
            self._held += content
            if len(self._held) < self._needed:
                return b""
            content = bytes(self._held)
            self._held.clear()
        self._needed = PRELUDE_BYTES
        at = min(self._unread, len(content))
        self._unread -= at
        self._reading.produced.add_unread(at)
        messages = 0
        try:
            while len(content) - at >= PRELUDE_BYTES:
                size = message_bytes(content[at : at + PRELUDE_BYTES])
                left = len(content) - at
                if size > EVENT_BYTES_MAX or (messages >= _MESSAGES_MAX and size <= left):
                    unread = min(size, left)
                    self._unread = size - unread
                    self._reading.produced.add_unread(unread)
                    at += unread
                elif size > left:
                    self._needed = size
                    break
                else:
                    self._read(content[at : at + size])
                    at += size
                messages += 1
        except FrameError:
            self._is_broken = True
            self._reading.produced.add_unread(len(content) - at)
            at = len(content)
        if at == len(content):
            return content
        self._held += content[at:]
        return content[:at]

    def finish(self) -> bytes:
        rest = bytes(self._held)
        self._held.clear()
        return rest

    def cut(self, event: bytes, *, exception: str = "") -> bytes:
        """See Meter. After a part of a message, only the end of the connection ends the stream."""
        self._held.clear()
        if self._unread or self._is_broken:
            return b""
        headers = {
            ":exception-type": exception,
            ":content-type": "application/json",
            ":message-type": "exception",
        }
        return make_message(headers, event)

    def _read(self, message: bytes) -> None:
        reading = self._reading
        try:
            headers, payload = read_message(message)
        except FrameError:
            # The lengths are sound, so the next message can be found; what this one contains is not trusted.
            reading.produced.add_unread(len(message))
            return
        reading.count(payload, 0, len(payload))
        kind = headers.get(":event-type", "")
        if reading.is_notable(kind):
            reading.read(payload, kind)
