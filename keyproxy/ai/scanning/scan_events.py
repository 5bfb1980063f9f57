"""What a scan reports of a document, in order: names, values, and where arrays and objects begin and end."""

from __future__ import annotations

from keyproxy.ai.scanning.member_scope import MemberScope, Name
from keyproxy.ai.scanning.open_frame import Frame
from keyproxy.mypyc_compat import mypyc_attr


@mypyc_attr(acyclic=True)
class ScanEvents:
    """Takes the events of one scan, and keeps what its purpose needs."""

    def note_name(self, frame: Frame, known: Name, name: bytes) -> None:
        """A member begins. `name`: decoded. Raises DoubledNameError."""
        raise NotImplementedError

    def note_plain(self, frame: Frame, start: int, end: int) -> None:
        """A number or literal is the value of the current member, or an element."""
        raise NotImplementedError

    def note_numbers(self, count: int) -> None:
        """Numbers are elements of an array in which no element counts."""
        raise NotImplementedError

    def note_string(self, frame: Frame, start: int, end: int, text: bytes | None) -> None:
        """A string is the value of the current member, or an element. `text`: it is short, and decoded."""
        raise NotImplementedError

    def open_frame(self, parent: Frame | None, start: int, scope: MemberScope, *, is_object: bool) -> Frame:
        """An array or object begins. `scope`: of the document."""
        raise NotImplementedError

    def close_frame(self, frame: Frame, parent: Frame | None, end: int) -> None:
        """An array or object ends."""
        raise NotImplementedError

    def pending_bytes(self) -> int:
        """How much noted text waits for `read_text`."""
        raise NotImplementedError

    def read_text(self, budget: int) -> int:
        """Read noted text for up to `budget` bytes; return what is left of it, more than 0 once all is read."""
        raise NotImplementedError
