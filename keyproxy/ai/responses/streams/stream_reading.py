"""Read the events of a stream, whatever their framing.

Streams carry an event for every token or two, and each passes here, so most events get two checks: is there a usage
that is not null, and has the model finished? Only events with one of these, and the first, are parsed; of all others,
the text is collected.
"""

from __future__ import annotations

import re
from typing import Final

import orjson

from keyproxy.ai.dialects.endpoint import Dialect, Endpoint, EndpointClass
from keyproxy.ai.responses.produced_text import MEDIA_MEMBERS, ProducedText
from keyproxy.ai.responses.usage_reader import UsageReader

#: A longer event is not parsed, which would take too long; its text is counted.
PARSED_BYTES_MAX: Final = 262_144

_VALUE: Final = rb'"[ \t]*+:[ \t]*+"(?!")([^"\\\r\n]*+(?:\\[^\r\n][^"\\\r\n]*+)*+)"'
_NEVER: Final = re.compile(rb"(?!)")


class EventPatterns:
    """What to look for in the events of an endpoint, before any is parsed.

    `notable`: literals, each with a pattern that begins with it and rules out a null. `text`: finds texts. `media`:
    finds base64. `kinds`: the types of events that must be parsed.
    """

    __slots__ = ("kinds", "media", "notable", "text")

    def __init__(self, endpoint: Endpoint) -> None:
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
        self.text: Final = _values(tuple(sorted(endpoint.text_members)))
        self.kinds: Final = frozenset(kinds)
        has_media = endpoint.kind in (EndpointClass.MEDIA, EndpointClass.UNKNOWN)
        self.media: Final = _values(MEDIA_MEMBERS) if has_media else None


#: By endpoint, of which there are as many as the table has rows.
_patterns: Final[dict[Endpoint, EventPatterns]] = {}


class StreamReading:
    """What was read of one stream: its `usage`, and its `produced` text."""

    def __init__(self, dialect: Dialect, endpoint: Endpoint, choices: int = 1) -> None:
        self.usage: Final = UsageReader(dialect, endpoint, choices)
        self.produced: Final = ProducedText()
        #: The first event names the model.
        self.has_begun = False
        patterns = _patterns.get(endpoint)
        if patterns is None:
            patterns = _patterns[endpoint] = EventPatterns(endpoint)
        self._notable: Final = patterns.notable
        self._kinds: Final = patterns.kinds
        self._text: Final = patterns.text
        self._media: Final = patterns.media

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

    def count(self, content: bytes | bytearray, start: int, end: int) -> None:
        """Collect the text of whole events."""
        self.produced.add(self._text.findall(content, start, end))
        if self._media is not None:
            for media in self._media.findall(content, start, end):
                self.produced.add_media(len(media) - media.count(b"="))

    def read(self, content: bytes, kind: str = "") -> dict[str, object] | None:
        """Parse an event if it must be; return it if it reports usage. `kind`: its type, if its framing states that."""
        if len(content) > PARSED_BYTES_MAX:
            return None
        try:
            event = orjson.loads(content)
        except ValueError:
            return None
        if not isinstance(event, dict):
            return None
        self.has_begun = True
        if not self.usage.read_event(event, kind):
            return None
        report = self.usage.report
        if report is not None:
            self.produced.report(report.tokens_out)
        return event


def _values(names: tuple[str, ...]) -> re.Pattern[bytes]:
    if not names:
        return _NEVER
    return re.compile(rb'"(?:' + b"|".join([re.escape(name.encode()) for name in names]) + rb")" + _VALUE)
