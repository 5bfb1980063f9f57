"""Read the usage that a stream of server-sent events reports, as its events pass.

Streams carry an event for every token or two, and each passes here, so most events get a single check: does it have a
`usage` that is not null? If none has, only the text is counted. Only events with a usage are parsed. Lines may end in
CR, LF or both, data may span lines, and comments and a byte order mark may occur.

Events are passed on whole, which delays nothing that a client could use, so that a stream can be ended between two. An
unfinished event is held back up to `HELD_BYTES_MAX`, and kept for reading up to `EVENT_BYTES_MAX`: that is the memory
of a stream. A longer one passes unread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import orjson

from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.usage_objects import anthropic_use, openai_use
from keyproxy.model import TokenUse

HELD_BYTES_MAX: Final = 65_536
EVENT_BYTES_MAX: Final = 1_048_576

#: A longer event is not parsed for its usage, which would take too long; its text is counted.
PARSED_BYTES_MAX: Final = 262_144

#: The size of a token in most languages and code; a truncated stream is charged by this.
_BYTES_A_TOKEN: Final = 4

#: Two line ends, the longer spellings first: a CR LF is never taken for two.
_EVENT_END = re.compile(rb"\r\n\r\n|\r\n\r|\r\n\n|\r\r\n|\r\r|\n\r\n|\n\r|\n\n")
_EVENT_END_BYTES_MAX: Final = 4

#: The most events of one piece that are read one by one; the rest of a longer piece passes unread, and is charged as if
#: each byte were a token. And the most checks for whether all following events can be counted together.
_EVENTS_MAX: Final = 1_024
_TRIES_MAX: Final = 16

#: A usage that may have a value. With `include_usage` all chunks but the last have a null.
_USAGE = re.compile(rb'"usage"(?![ \t]*:[ \t]*null)')

_TEXT_VALUE: Final = rb'"[ \t]*:[ \t]*"((?:[^"\\\r\n]|\\[^\r\n])++)"'
#: The model's output: in chunks of chat completions, completions and Anthropic's messages, and in responses' deltas.
_TEXT = re.compile(
    rb'"(?:content|text|arguments|reasoning_content|reasoning|refusal|thinking|partial_json)' + _TEXT_VALUE
)
_RESPONSES_TEXT = re.compile(rb'"delta' + _TEXT_VALUE)


class StreamMeter(Meter):
    """For a response that is a stream of events."""

    is_stream = True

    def __init__(self, kind: str, *, hides_usage: bool) -> None:
        super().__init__()
        self._is_anthropic = kind == "anthropic"
        self._hides_usage = hides_usage
        self._pieces = 0
        self._text_bytes = 0
        #: The fields that contain text, determined by the first event.
        self._text: re.Pattern[bytes] | None = None
        self._started: Mapping[str, object] = {}
        self._event = bytearray()
        #: How much of the unfinished event was sent to the client, and whether it has become too long to be read.
        self._passed = 0
        self._is_oversize = False
        #: The last event ended in CR: a following LF is part of it, and is passed on or left out with it.
        self._awaits_lf = False
        self._has_hidden = False

    @property
    def produced(self) -> int:
        """See Meter. The last report, plus one token for each piece of text since then, or more for a long one."""
        return max(self._pieces, -(-self._text_bytes // _BYTES_A_TOKEN))

    @property
    def produced_bound(self) -> int:
        """See Meter."""
        return max(self._pieces, self._text_bytes)

    def feed(self, content: bytes) -> bytes:
        """See Meter."""
        if self._event or self._awaits_lf or self._text is None:
            return self._feed_apart(content)
        plain = self._count_plain(content)
        if plain == len(content):
            return content
        return content[:plain] + self._feed_apart(content[plain:])

    def finish(self) -> bytes:
        """See Meter. Some upstreams do not end their last event."""
        rest = bytes(self._event)
        keeps = not rest or self._is_oversize or self._read(rest)
        out = rest[self._passed :] if keeps or self._passed else b""
        self._event.clear()
        self._passed = 0
        return out

    def cut(self, event: bytes) -> bytes:
        """See Meter."""
        begun, self._passed = self._passed, 0
        self._event.clear()
        return b"\n\n" + event if begun else event

    def _count_plain(self, content: bytes | bytearray) -> int:
        """Count the text of the whole events at the beginning, up to one with a usage; return their length in bytes."""
        if self._text is None:
            return 0
        match = _USAGE.search(content) if content.find(b'"usage"') >= 0 else None
        end = content.rfind(b"\n\n", 0, len(content) if match is None else match.start()) + 2
        if end < 2:
            return 0
        found = self._text.findall(content, 0, end)
        self._pieces += len(found)
        self._text_bytes += len(b"".join(found))
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
            self._has_hidden = not (self._is_oversize or self._read(block)) and not self._passed
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
            self._drop(out)
        elif len(event) > HELD_BYTES_MAX:
            out.append(bytes(event[self._passed :]))
            self._passed = len(event)
        return b"".join(out)

    def _drop(self, out: list[bytes]) -> None:
        """Pass on what has arrived of the unfinished event, and any content after it, unread."""
        event = self._event
        out.append(bytes(event[self._passed :]))
        self._text_bytes += max(0, len(event) - _EVENT_END_BYTES_MAX)  # unread, so each byte may be a token
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
        if self._text is None and b"data:" in block:
            self._text = _RESPONSES_TEXT if b'"response.' in block else _TEXT
        if self._text is not None:
            found = self._text.findall(block)
            self._pieces += len(found)
            self._text_bytes += len(b"".join(found))
        if len(block) > PARSED_BYTES_MAX or not _USAGE.search(block):
            return True
        try:
            event = orjson.loads(_data(block))
        except ValueError:
            return True
        if not isinstance(event, dict):
            return True
        if self._is_anthropic:
            self._read_anthropic(event)
            return True
        return self._read_openai(event)

    def _read_openai(self, event: dict[str, Any]) -> bool:
        response = event.get("response")
        usage = (response if isinstance(response, dict) else event).get("usage")
        if not isinstance(usage, dict):
            return True
        self._report(openai_use(usage))
        return not (self._hides_usage and event.get("choices") == [])

    def _read_anthropic(self, event: dict[str, Any]) -> None:
        if event.get("type") == "message_start":
            message = event.get("message")
            usage = message.get("usage") if isinstance(message, dict) else None
            if isinstance(usage, dict):
                self._started = usage
                started = anthropic_use({**usage, "output_tokens": 0})
                self.tokens_in = None if started is None else started.tokens_in
        elif event.get("type") == "message_delta" and isinstance(usage := event.get("usage"), dict):
            # Cumulative. Fields that are not repeated keep their values from the start of the stream.
            said = {name: value for name, value in usage.items() if value is not None}
            self._report(anthropic_use({**self._started, **said}) if "output_tokens" in said else None)

    def _report(self, use: TokenUse | None) -> None:
        self._said = use
        if use is not None:
            self.tokens_in = use.tokens_in
            self._pieces = self._text_bytes = use.tokens_out


def _data(block: bytes) -> bytes:
    """Return the data of an event: the values of its `data` lines, joined."""
    lines = block.removeprefix(b"\xef\xbb\xbf").splitlines()
    return b"\n".join([line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")])
