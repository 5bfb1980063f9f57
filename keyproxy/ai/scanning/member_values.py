"""The members of a document that count, and nothing else of it: for a scan that does not estimate tokens."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.scanning.json_grammar import decoded
from keyproxy.ai.scanning.member_meanings import NO_MEANING
from keyproxy.ai.scanning.member_scope import NO_SCOPE, MemberScope, Name
from keyproxy.ai.scanning.open_frame import Frame
from keyproxy.ai.scanning.request_parts import TOO_LONG, DoubledNameError
from keyproxy.ai.scanning.scan_events import ScanEvents
from keyproxy.mypyc_compat import mypyc_attr

#: Of a longer string, only where it stands is kept.
_KEPT_BYTES_MAX: Final = 1_024


@mypyc_attr(acyclic=True)
class MemberValues(ScanEvents):
    """Takes the events of a scan whose scope keeps the values of all its members.

    `values`: by their path: raw bytes of a number or literal, decoded text (TOO_LONG for a longer one), or an empty array
    or object for any. `spans`: where these values stand. `is_object`: the document is an object.
    """

    __slots__ = ("_content", "is_object", "spans", "values")

    def __init__(self, content: bytes) -> None:
        self.is_object = False
        self.values: Final[dict[str, bytes | str | list[str] | dict[str, str]]] = {}
        self.spans: Final[dict[str, tuple[int, int]]] = {}
        self._content: Final = content

    def text(self, path: str) -> str | None:
        """The string at this path, however long; None for another value, or without one."""
        if not isinstance(self.values.get(path), str):
            return None
        start, end = self.spans[path]
        return decoded(self._content, start + 1, end - 1).decode("utf-8")

    def raw(self, path: str) -> bytes:
        """The JSON text of the value at this path, which is present."""
        start, end = self.spans[path]
        return self._content[start:end]

    def note_name(self, frame: Frame, known: Name, name: bytes) -> None:
        frame.slot = slot = known.slot
        if slot is not None:
            if frame.seen & slot.bit:
                raise DoubledNameError(slot.path)
            frame.seen |= slot.bit

    def note_plain(self, frame: Frame, start: int, end: int) -> None:
        slot = frame.slot
        if slot is not None:
            self.values[slot.path] = self._content[start:end]
            self.spans[slot.path] = (start, end)

    def note_numbers(self, count: int) -> None:
        pass

    def note_string(self, frame: Frame, start: int, end: int, text: bytes | None) -> None:
        slot = frame.slot
        if slot is None:
            return
        if end - start > _KEPT_BYTES_MAX:
            self.values[slot.path] = TOO_LONG
        else:
            self.values[slot.path] = (decoded(self._content, start, end) if text is None else text).decode("utf-8")
        self.spans[slot.path] = (start - 1, end + 1)

    def open_frame(self, parent: Frame | None, start: int, scope: MemberScope, *, is_object: bool) -> Frame:
        if parent is None:
            self.is_object = is_object
            frame = Frame(start, 0, NO_MEANING, None, is_object=is_object)
            frame.scope = scope if is_object else NO_SCOPE
            return frame
        slot = parent.slot
        frame = Frame(start, parent.depth + 1, NO_MEANING, slot, is_object=is_object)
        if slot is not None and slot.scope is not None and is_object:
            frame.scope = slot.scope
        return frame

    def close_frame(self, frame: Frame, parent: Frame | None, end: int) -> None:
        slot = frame.own_slot
        if slot is not None:
            self.values[slot.path] = {} if frame.is_object else []
            self.spans[slot.path] = (frame.start, end)

    def pending_bytes(self) -> int:
        return 0

    def read_text(self, budget: int) -> int:
        return budget
