"""The open arrays and objects of a request's JSON while it is scanned."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.scanning.content_media import PartFacts
from keyproxy.ai.scanning.member_meanings import NO_MEANING
from keyproxy.ai.scanning.member_scope import NO_SCOPE, MemberScope, Slot
from keyproxy.mypyc_compat import mypyc_attr


@mypyc_attr(acyclic=True)
class Frame:
    """An open array or object. `meaning`, `name`: of the member that is being read; `own`: of the one it is itself.

    `counts_names`: names in it are part of the prompt. `depth`: 0 for the document. `scope`: of an object, the members
    that count; of an array, the scope of its elements. `slot`: the member that is being read, if it counts. `own_slot`:
    the one that it is the value of. `seen`: the bits of the members that count and have occurred.
    """

    __slots__ = (
        "counts_names", "depth", "elements", "is_empty", "is_object", "meaning", "own", "own_slot", "part",
        "scope", "seen", "slot", "start",
    )  # fmt: skip

    def __init__(self, start: int, depth: int, own: int, own_slot: Slot | None, *, is_object: bool) -> None:
        self.start: Final = start
        self.depth: Final = depth
        self.own: Final = own
        self.own_slot: Final = own_slot
        self.is_object: Final = is_object
        self.scope: MemberScope = NO_SCOPE
        self.slot: Slot | None = None
        self.seen = 0
        self.meaning = NO_MEANING
        self.counts_names = False
        self.is_empty = True
        self.elements = 0
        self.part: PartFacts | None = None

    def part_facts(self) -> PartFacts:
        """What it has of a content part so far."""
        part = self.part
        if part is None:
            part = self.part = PartFacts()
        return part
