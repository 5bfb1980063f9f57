"""What a request's JSON contains, collected while it is scanned: members that count, texts, media, references."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.scanning.content_media import IMAGE
from keyproxy.ai.scanning.instruction_spans import ENTRIES, NOTHING, ROLE, InstructionMembers, InstructionSpans
from keyproxy.ai.scanning.json_grammar import decoded
from keyproxy.ai.scanning.media_reader import MediaReader
from keyproxy.ai.scanning.member_meanings import (
    CONTEXT,
    IMAGES,
    MESSAGES,
    NAMED,
    NO_MEANING,
    PROMPT,
    REFERENCE,
    TOOLS,
)
from keyproxy.ai.scanning.member_scope import NO_SCOPE, MemberScope, Name
from keyproxy.ai.scanning.open_frame import Frame
from keyproxy.ai.scanning.pending_text import PendingText
from keyproxy.ai.scanning.scan_events import ScanEvents
from keyproxy.mypyc_compat import mypyc_attr

#: A longer value of a member that counts is kept as this many bytes.
_KEPT_BYTES_MAX: Final = 1_024

_MINUS: Final = 0x2D
_NINE: Final = 0x39

#: Stands for a longer string.
TOO_LONG: Final = "\0"


class DoubledNameError(Exception):
    """A member that counts stands twice; the text is its path."""


@mypyc_attr(acyclic=True)
class RequestParts(ScanEvents):
    """The result of a scan.

    `values`: of the members that count, by their path: raw bytes of a number or literal, decoded text, or an empty
    array or object for any. `spans`: where these values stand. `opening`: where the outermost object opens.
    `empty`: paths of objects without members; `""` is the document. `prompts`: strings and arrays in `prompt`.
    `instructions`: what the instructions depend on; None if the scope does not name their members.
    """

    def __init__(
        self, content: bytes, *, has_image_arrays: bool, instructions: InstructionMembers | None = None
    ) -> None:
        self.values: dict[str, bytes | str | list[str] | dict[str, str]] = {}
        self.spans: dict[str, tuple[int, int]] = {}
        self.empty: set[str] = set()
        self.is_object = False
        self.opening = 0
        self.prompts = 0
        self.message_objects = 0
        self.array_numbers = 0
        self.has_tools = False
        self.text: Final = PendingText(content)
        self.media: Final = MediaReader(content, self.text)
        self.content: Final = content
        self.instructions: Final = None if instructions is None else InstructionSpans(content, instructions)
        self._has_image_arrays: Final = has_image_arrays

    # -- events of the scan

    def note_name(self, frame: Frame, known: Name, name: bytes) -> None:
        frame.is_empty = False
        frame.meaning = known.meaning
        frame.slot = slot = known.slot
        if slot is not None:
            if frame.seen & slot.bit:
                raise DoubledNameError(slot.path)
            frame.seen |= slot.bit
            if slot.is_kept:
                self.values[slot.path] = []
        if frame.counts_names:
            self.text.add_decoded(name)

    def note_plain(self, frame: Frame, start: int, end: int) -> None:
        frame.is_empty = False
        slot = frame.slot
        if self.instructions is not None:
            self.instructions.note_plain(start, end)
            if slot is not None:
                self.instructions.note_member(slot.part, slot.path, start, end)
            elif _part_of_element(frame):
                self.instructions.note_entry(start, end, is_object=False)
        if slot is not None and slot.is_kept:
            self.values[slot.path] = self.content[start : min(end, start + _KEPT_BYTES_MAX)]
            self.spans[slot.path] = (start, end)
        elif not frame.is_object and _MINUS <= self.content[start] <= _NINE:
            self.array_numbers += 1

    def note_numbers(self, count: int) -> None:
        self.array_numbers += count

    def note_string(self, frame: Frame, start: int, end: int, text: bytes | None) -> None:
        frame.is_empty = False
        slot = frame.slot
        if slot is not None:
            if slot.is_kept:
                self.values[slot.path] = self._kept(start, end, text)
                self.spans[slot.path] = (start - 1, end + 1)
            if slot.part and self.instructions is not None:
                if slot.part == ROLE:
                    self.instructions.note_role(frame.start, text)
                else:
                    self.instructions.note_string(slot.part, slot.path, start - 1, end + 1)
        if not frame.is_object:
            frame.elements += 1
            if self.instructions is not None and _part_of_element(frame):
                self.instructions.note_entry(start, end, is_object=False)
            if frame.own == IMAGES and self._has_image_arrays:
                self.media.count.add(IMAGE, 0)
                return
        elif frame.meaning and self.media.is_medium(frame, start, end):
            return
        if text is None:
            self.text.add(start, end)
        else:
            self.text.add_decoded(text)

    def open_frame(self, parent: Frame | None, start: int, scope: MemberScope, *, is_object: bool) -> Frame:
        if parent is None:
            frame = Frame(start, 0, NO_MEANING, None, is_object=is_object)
            frame.scope = scope if is_object else scope.each or NO_SCOPE
            if is_object:
                self.is_object = True
                self.opening = start
            return frame
        parent.is_empty = False
        own = parent.meaning if parent.is_object else NO_MEANING
        slot = parent.slot
        frame = Frame(start, parent.depth + 1, own, slot, is_object=is_object)
        if slot is not None or not parent.is_object:
            inner = parent.scope if slot is None else slot.scope
            if inner is not None:
                frame.scope = inner if is_object else inner.each or NO_SCOPE
        frame.counts_names = parent.counts_names or own in (NAMED, TOOLS)
        if not parent.is_object:
            if not is_object:
                parent.elements += 1
            elif parent.depth == 1 and parent.own == MESSAGES:
                self.message_objects += 1
        elif own == MESSAGES and is_object and parent.depth == 0:
            self.message_objects += 1
        elif own == REFERENCE or (own == CONTEXT and parent.depth == 0):
            self.media.refer("file" if own == REFERENCE else "conversation")
        return frame

    def close_frame(self, frame: Frame, parent: Frame | None, end: int) -> None:
        slot = frame.own_slot
        if self.instructions is not None:
            if slot is not None:
                self.instructions.note_container(slot.part, slot.path, frame.start, end, is_object=frame.is_object)
            elif parent is not None and _part_of_element(parent):
                self.instructions.note_entry(frame.start, end, is_object=frame.is_object)
        if slot is not None and slot.is_kept and parent is not None and parent.is_object and parent.slot is slot:
            self.values[slot.path] = {} if frame.is_object else []
            self.spans[slot.path] = (frame.start, end)
            if frame.is_empty:
                self.empty.add(slot.path)
        elif parent is None and frame.is_empty:
            self.empty.add("")
        if frame.own == PROMPT and frame.depth == 1 and not frame.is_object:
            self.prompts = frame.elements
        elif frame.own == TOOLS and frame.depth == 1 and not frame.is_empty:
            self.has_tools = True
        part = frame.part
        if part is not None:
            self.media.end_part(frame, part, parent)

    def pending_bytes(self) -> int:
        return self.text.pending_bytes

    def read_text(self, budget: int) -> int:
        return self.text.read(budget)

    def _kept(self, start: int, end: int, text: bytes | None) -> str:
        """A string value of a member that counts. None that counts is so long: a longer one equals no other."""
        if end - start > _KEPT_BYTES_MAX:
            return TOO_LONG
        return (decoded(self.content, start, end) if text is None else text).decode("utf-8")


def _part_of_element(frame: Frame) -> int:
    """What the elements of an array are to the instructions: ENTRIES or NOTHING."""
    own = frame.own_slot
    return ENTRIES if own is not None and own.part == ENTRIES and not frame.is_object else NOTHING
