"""Remove the tools that a credential may not call from the response to `tools/list`.

The lists of JSON responses and of event streams are read; what cannot be read is not forwarded. A list that a client
fetches in another way, such as by resuming a stream, is not filtered: the call is the boundary.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

from keyproxy.http_messages import ResponseFields
from keyproxy.reasons import Reason, Refusal

#: Of a JSON response, and of one event.
CONTENT_BYTES_MAX: Final = 1_048_576

_EVENTS: Final = b"text/event-stream"

#: An empty line ends an event. https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
_EVENT_END: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
#: Written anew, it has a quote.
_ESCAPED_QUOTE: Final = b"\\u0022"
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class ToolListFilter:
    """Filters one response. `allowed`: the names of the tools that the credential may call."""

    __slots__ = ("_allowed", "_at_start", "_buffer", "_is_stream")

    def __init__(self, allowed: frozenset[str]) -> None:
        self._allowed: Final = allowed
        self._buffer = bytearray()
        self._is_stream = False
        self._at_start = True

    def begin(self, fields: ResponseFields) -> None:
        """Begin with the head of a response that has a body. Raises a Refusal (UPSTREAM_INVALID)."""
        if any(coding != b"identity" for coding in fields.codings):
            raise _invalid("it is compressed, although identity was requested")
        self._is_stream = fields.media_type == _EVENTS
        if not (self._is_stream or fields.is_json):
            raise _invalid("it is neither JSON nor a stream of events")

    def feed(self, content: bytes, *, is_last: bool) -> bytes:
        """Take the next content; return the part of it that may be forwarded now. Raises a Refusal (UPSTREAM_INVALID)."""
        buffer = self._buffer
        buffer += content
        out = self._events() if self._is_stream else b""
        if len(buffer) > CONTENT_BYTES_MAX:
            raise _invalid(f"it has more than {CONTENT_BYTES_MAX} bytes")
        if is_last:
            rest = bytes(buffer)
            out += self._event(rest) if self._is_stream else self._document(rest)
            self._buffer = bytearray()
        return out

    def _events(self) -> bytes:
        """The complete events of the buffer, which are removed from it."""
        buffer, out, at = self._buffer, [], 0
        if self._at_start and buffer:
            if len(buffer) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(bytes(buffer)):
                return b""
            # A client ignores it, and reads the first field after it.
            self._at_start = False
            if buffer.startswith(_BYTE_ORDER_MARK):
                del buffer[: len(_BYTE_ORDER_MARK)]
        while (end := _EVENT_END.search(buffer, at)) is not None:
            out.append(self._event(bytes(buffer[at : end.end()])))
            at = end.end()
        del buffer[:at]
        return b"".join(out)

    def _event(self, block: bytes) -> bytes:
        """One event, complete or the rest of a stream."""
        others, data = [], []
        for line in _LINE_END.split(block):
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
            elif line:
                others.append(line)
        content = b"\n".join(data)
        filtered = self._document(content)
        if filtered is content:
            return block
        return b"\n".join([*others, b"data: " + filtered, b"", b""])

    def _document(self, content: bytes) -> bytes:
        """One document; the same object if nothing of it has changed."""
        if not content.strip():
            return content
        try:
            document = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise _invalid("it is not JSON") from error
        messages = document if isinstance(document, list) else [document]
        # Each of them is filtered: the results are changed in place.
        has_changed = [self._filter(message) for message in messages]
        written = orjson.dumps(document)
        return written if any(has_changed) or _has_repeated_names(content, written) else content

    def _filter(self, message: Any) -> bool:
        """Filter the list in a message; return whether the message has changed."""
        result = message.get("result") if isinstance(message, dict) else None
        if not isinstance(result, dict) or "tools" not in result:
            return False
        tools = result["tools"]
        if not isinstance(tools, list):
            raise _invalid("its tools are not a list")
        kept = [tool for tool in tools if self._is_allowed(tool)]
        has_changed = len(kept) != len(tools)
        if has_changed:
            result["tools"] = kept
        if result.get("cacheScope") == "public":
            # The list depends on the credential now.
            result["cacheScope"] = "private"
            has_changed = True
        return has_changed

    def _is_allowed(self, tool: Any) -> bool:
        name = tool.get("name") if isinstance(tool, dict) else None
        return isinstance(name, str) and name in self._allowed


def _has_repeated_names(content: bytes, written: bytes) -> bool:
    """Whether a document may have members that were read over, of which a client may read the first.

    They are missing from what was written anew, with the quotes of their names.
    """
    return written.count(b'"') != content.count(b'"') or _ESCAPED_QUOTE in content


def _invalid(detail: str) -> Refusal:
    return Refusal(
        Reason.UPSTREAM_INVALID,
        f"the list of tools: {detail}",
        caller_text="The list of tools from the compute server cannot be filtered.",
        replaces_sentence=True,
    )
