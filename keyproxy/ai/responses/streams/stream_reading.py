"""Read the events of a stream, whatever their framing.

Streams carry an event for every token or two, and each passes here, so most events get two checks: is there a usage
that is not null, and has the model finished? Only events with one of these, and the first, are parsed; of all others,
the text is collected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import orjson

from keyproxy.ai.dialects.endpoint import Dialect, DialectEndpoint, EndpointClass
from keyproxy.ai.json_characters import ON_LINE
from keyproxy.ai.responses.json_members import MemberScanner
from keyproxy.ai.responses.json_strings import StringCounter
from keyproxy.ai.responses.produced_text import MEDIA_MEMBERS, ProducedText
from keyproxy.ai.responses.streams.repeated_event import RepeatedEvent
from keyproxy.ai.responses.usage_reader import ResponseUsageReader, outermost_members

#: A longer event is neither kept nor parsed, but scanned in pieces for the members of its outermost object.
EVENT_BYTES_MAX: Final = 262_144

#: Scanned at a time, which bounds the copies.
_SLICE_BYTES: Final = 65_536

_VALUE: Final = rb'"[ \t]*+:[ \t]*+"(?!")(' + ON_LINE + rb"*+(?:\\[^\r\n]" + ON_LINE + rb'*+)*+)"'
_NEVER: Final = re.compile(rb"(?!)")


class EventPatterns:
    """What to look for in the events of an endpoint, before any is parsed.

    `notable`: literals, each with a pattern that begins with it and rules out a null. `text`: finds texts. `media`:
    finds base64. `kinds`: the types of events that must be parsed. `members`: what is read of a long event.
    `names`: those of the literals.
    """

    __slots__ = ("kinds", "media", "members", "names", "notable", "text")

    def __init__(self, dialect: Dialect, endpoint: DialectEndpoint) -> None:
        self.members: Final = ("type", *outermost_members(dialect, endpoint))
        names: dict[bytes, bytes] = {}
        kinds: set[str] = set()
        for fields in endpoint.usage:
            paths = [fields.inputs[0], *fields.outputs[:1]]
            members = [place[-1] if place else path[0] for place in fields.places for path in paths]
            for name in fields.events or members:
                names[name.encode()] = rb"" if fields.events else rb"(?![ \t]*:[ \t]*null)"
            kinds.update(fields.events)
        finish = endpoint.finish
        if finish is not None:
            kinds.update((finish.event, finish.begins))
            for name in (finish.event, finish.begins):
                names[name.encode()] = rb""
            if finish.member:
                names[finish.member[-1].encode()] = rb"(?![ \t]*:[ \t]*(?:null|false))"
        names.pop(b"", None)
        quoted = {b'"%b"' % name: rest for name, rest in names.items()}
        self.notable: Final = tuple((name, re.compile(re.escape(name) + rest)) for name, rest in quoted.items())
        self.names: Final = frozenset(names)
        self.text: Final = _values(tuple(sorted(endpoint.text_members)))
        self.kinds: Final = frozenset(kinds)
        has_media = endpoint.kind in (EndpointClass.MEDIA, EndpointClass.UNKNOWN)
        self.media: Final = _values(MEDIA_MEMBERS) if has_media else None


#: By dialect and endpoint, of which there are as many as the table has rows.
_patterns: Final[dict[tuple[str, DialectEndpoint], EventPatterns]] = {}


class _LongEvent:
    """Reads an event that is too long to be kept, from pieces: an image or a sound that the model has made."""

    def __init__(self, names: Sequence[str]) -> None:
        self._members: Final = MemberScanner(names)
        self._strings: Final = StringCounter()

    def feed(self, piece: bytes) -> None:
        """Scan the next piece. What frames the event has no quotes and no brackets."""
        self._members.feed(piece)
        self._strings.feed(piece)

    @property
    def found(self) -> dict[str, object]:
        """The outermost members that matter."""
        return self._members.found

    @property
    def tokens(self) -> int:
        """The estimate of all its strings."""
        return self._strings.tokens


class StreamReading:
    """What was read of one stream: its `usage`, and its `produced` text."""

    def __init__(self, dialect: Dialect, endpoint: DialectEndpoint, usage: ResponseUsageReader) -> None:
        self.usage: Final = usage
        self.produced: Final = ProducedText()
        #: The first event names the model.
        self.has_begun = False
        key = (dialect.name, endpoint)
        patterns = _patterns.get(key)
        if patterns is None:
            patterns = _patterns[key] = EventPatterns(dialect, endpoint)
        self._long: _LongEvent | None = None
        self._names: Final = patterns.members
        self._notable: Final = patterns.notable
        self._kinds: Final = patterns.kinds
        self._text: Final = patterns.text
        self._media: Final = patterns.media
        self._repeated: Final = RepeatedEvent(patterns.names)
        #: How many texts were counted last.
        self._texts = 0

    def notable(self, content: bytes | bytearray, start: int = 0) -> int:
        """Return a place within the first event that must be parsed; -1 if there is none."""
        first = -1
        for name, pattern in self._notable:
            at = content.find(name, start)
            if at >= 0:
                match = pattern.search(content, at)
                if match is not None and (first < 0 or match.start() < first):
                    first = match.start()
        return first

    def is_notable(self, kind: str) -> bool:
        """Whether an event must be parsed, by its type."""
        return not self.has_begun or kind in self._kinds

    def count_repeated(self, content: bytes) -> bool:
        """Collect the text of whole events that repeat the last ones; return whether they do."""
        text = self._repeated.text(content) if self.has_begun else b""
        if text:
            self.produced.add((text,))
        return bool(text)

    def count(self, content: bytes | bytearray, start: int, end: int) -> None:
        """Collect the text of whole events."""
        texts = self._text.findall(content, start, end)
        self.produced.add(texts)
        self._texts = len(texts)
        if self._media is not None:
            for media in self._media.findall(content, start, end):
                self.produced.add_media(len(media) - media.count(b"="))

    def remember(self, content: bytes) -> None:
        """Remember whole events, which were counted last, and none of which had to be parsed."""
        if self._texts == 1 and self._media is None:
            self._repeated.remember(content, self._text)

    @property
    def tokens(self) -> int:
        """The estimate of what was produced, with a long event so far."""
        return self.produced.tokens + (0 if self._long is None else self._long.tokens)

    @property
    def bound(self) -> int:
        """At least `tokens`, and cheap."""
        return self.produced.bound + (0 if self._long is None else self._long.tokens)

    @property
    def has_long(self) -> bool:
        """Whether the unfinished event is a long one."""
        return self._long is not None

    def feed_long(self, content: bytes | bytearray, start: int, end: int) -> None:
        """Scan a piece of an event that is too long to be kept."""
        if self._long is None:
            self._long = _LongEvent(self._names)
        for at in range(start, end, _SLICE_BYTES):
            self._long.feed(bytes(content[at : min(end, at + _SLICE_BYTES)]))

    def end_long(self) -> None:
        """Count the long event, and read what it reports."""
        event, self._long = self._long, None
        if event is not None:
            self.produced.add_tokens(event.tokens)
            self._take(event.found, "")

    def read(self, content: bytes, kind: str = "") -> dict[str, object] | None:
        """Parse an event if it must be; return it if it reports usage. `kind`: its type, if its framing states that."""
        try:
            event = orjson.loads(content)
        except ValueError:
            return None
        if not isinstance(event, dict):
            return None
        return event if self._take(event, kind) else None

    def _take(self, event: dict[str, object], kind: str) -> bool:
        self.has_begun = True
        if not self.usage.read_event(event, kind):
            return False
        report = self.usage.report
        if report is not None:
            self.produced.report(report.tokens_out)
        return True


def _values(names: tuple[str, ...]) -> re.Pattern[bytes]:
    if not names:
        return _NEVER
    return re.compile(rb'"(?:' + b"|".join([re.escape(name.encode()) for name in names]) + rb")" + _VALUE)
