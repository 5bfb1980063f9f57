"""The members of a request that count, and the spellings that some parsers take for them.

A member counts once, in one spelling: servers differ in which of two they read, and some ignore case, end a name at a
NUL, or accept camelCase and snake_case. JSON escapes do not make another name: names are compared decoded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from keyproxy.ai.dialects.endpoint import EACH, Dialect, MemberPath
from keyproxy.ai.scanning.instruction_spans import ENTRIES, NOTHING, ROLE, STORED, WHOLE, InstructionMembers
from keyproxy.ai.scanning.member_meanings import MEANINGS, NO_MEANING

#: Members with other models that the upstream may use instead.
ALTERNATIVES: Final = ("models", "fallbacks", "context_window_fallbacks", "content_policy_fallbacks")

#: Java's equalsIgnoreCase takes the Turkish i, with a dot or without, in capitals or not, for the Latin one.
_DOT_ABOVE: Final = "\u0307"

#: A JavaScript server that copies an object makes the members of this one its own.
PROTOTYPE: Final = b"__proto__"

#: Requests to one API use the same few names. The memory of them is emptied when full.
_KNOWN_MAX: Final = 1_024
_KNOWN_BYTES_MAX: Final = 64

_HUMP: Final = re.compile(r"(?<=[a-z0-9])[A-Z]")


def folded(name: str) -> str:
    """The name without the differences that some parsers ignore."""
    return name.partition("\0")[0].strip().upper().casefold().replace(_DOT_ABOVE, "")


class AmbiguousNameError(Exception):
    """A name that some parsers take for a member that counts; the text is that member."""


class Slot:
    """A member that counts. `path`: its names, outermost first, in the dialect's own spelling, joined by dots.

    `scope`: of its value. `is_kept`: the scan keeps its value; other values only have to be unambiguous. `bit`: its own
    among the members of one scope. `part`: what it is to the instructions of a request, one of `instruction_spans`.
    """

    __slots__ = ("bit", "is_kept", "part", "path", "scope")

    def __init__(self, path: str, scope: MemberScope | None, bit: int, *, is_kept: bool) -> None:
        self.path: Final = path
        self.scope: Final = scope
        self.bit: Final = bit
        self.is_kept: Final = is_kept
        self.part = NOTHING


class Name:
    """What a decoded name is in one scope. `slot`: None unless it counts. `meaning`: one of `member_meanings`."""

    __slots__ = ("meaning", "slot")

    def __init__(self, slot: Slot | None, meaning: int) -> None:
        self.slot: Final = slot
        self.meaning: Final = meaning


class MemberScope:
    """The members of one object that count.

    `known`: names that have occurred, by their bytes in JSON, which are also the decoded name: those with escapes are
    left out, because they are different names with the same bytes. `each`: the scope of the elements of an array in the
    place of the object; None: no member counts in them. `instructions`: the members with instructions, of a document
    whose scan finds what these depend on; else None.
    """

    __slots__ = ("_folded", "_has_twins", "_slots", "each", "instructions", "known")

    def __init__(self, slots: dict[bytes, Slot], each: MemberScope | None = None, *, has_twins: bool = False) -> None:
        """`slots`: by each spelling, decoded. `has_twins`: another spelling in camelCase or snake_case is ambiguous."""
        self.known: Final[dict[bytes, Name]] = {}
        self.each: Final = each
        self.instructions: InstructionMembers | None = None
        self._slots: Final = slots
        self._has_twins: Final = has_twins
        self._folded: Final = {self._fold(name): name.decode("utf-8") for name in reversed(slots)}

    def _fold(self, name: bytes) -> str:
        found = folded(name.decode("utf-8"))
        return found.replace("_", "") if self._has_twins else found

    def mark(self, name: str, part: int) -> Slot:
        """Set what a member that counts is to the instructions."""
        slot = self._slots[name.encode("ascii")]
        slot.part = part
        return slot

    def name(self, name: bytes) -> Name:
        """Look up a decoded name. Raises AmbiguousNameError."""
        known = self.known
        found = known.get(name)
        if found is not None:
            return found
        slot = self._slots.get(name)
        if slot is None and self._slots:
            if name == PROTOTYPE:
                raise AmbiguousNameError(PROTOTYPE.decode())
            meant = self._folded.get(self._fold(name))
            if meant is not None:
                raise AmbiguousNameError(meant)
        found = Name(slot, MEANINGS.get(name, NO_MEANING))
        if len(name) <= _KNOWN_BYTES_MAX and b"\\" not in name:
            if len(known) >= _KNOWN_MAX:
                known.clear()
            known[name] = found
        return found


#: The scope of objects in which no member counts.
NO_SCOPE: Final = MemberScope({})


class JudgedMembers(NamedTuple):
    """The members that count because a request is judged by them; EACH in a path is every element of an array.

    `instructions`: see `MemberScope`; all of its members are among `paths`.
    """

    paths: tuple[MemberPath, ...] = ()
    instructions: InstructionMembers | None = None


NO_MEMBERS: Final = JudgedMembers()


def scope_of(dialect: Dialect, model_member: str = "model", judged: JudgedMembers = NO_MEMBERS) -> MemberScope:
    """Build the scope of a request's document, once per route. `model_member`: the member with the model.

    A member `model` counts on every metered route: it must not name another model than the route's source.
    """
    kept: list[MemberPath] = [(model_member,), ("model",), *((name,) for name in ALTERNATIVES)]
    for row in (*dialect.endpoints, dialect.usual):
        kept += [*row.maximums, *row.multipliers]
        if row.prompts:
            kept.append((row.prompts,))
        if row.adds_include_usage:
            kept.append(("stream_options", "include_usage"))
    kept += dialect.thinking
    if dialect.streams_by_member:
        kept.append(("stream",))
    return _document_scope(kept, judged, has_twins=dialect.has_twins)


def scope_of_paths(kept: Sequence[MemberPath], judged: JudgedMembers) -> MemberScope:
    """Build the scope of a document in which these members count. `kept`: those whose values the scan keeps."""
    return _document_scope(kept, judged, has_twins=False)


def _document_scope(kept: Sequence[MemberPath], judged: JudgedMembers, *, has_twins: bool) -> MemberScope:
    scope = _scope(kept, judged.paths, "", has_twins=has_twins)
    members = scope.instructions = judged.instructions
    if members is not None:
        for part, names in ((WHOLE, members.whole), (STORED, members.stored), (ENTRIES, members.entries)):
            for name in names:
                inner = scope.mark(name, part).scope
                if part == ENTRIES and inner is not None:
                    for entry in (inner, inner.each or inner):
                        entry.mark("role", ROLE)
    return scope


def _scope(kept: Sequence[MemberPath], judged: Sequence[MemberPath], prefix: str, *, has_twins: bool) -> MemberScope:
    slots: dict[bytes, Slot] = {}
    each: MemberScope | None = None
    for number, name in enumerate(dict.fromkeys([path[0] for path in (*kept, *judged)])):
        kept_here = [path[1:] for path in kept if path[0] == name]
        kept_within = [path for path in kept_here if path]
        judged_within = [path[1:] for path in judged if path[0] == name and len(path) > 1]
        path, scope = prefix + name, None
        if kept_within or judged_within:
            scope = _scope(kept_within, judged_within, f"{path}.", has_twins=has_twins)
        if name == EACH:
            each = scope
            continue
        slot = Slot(path, scope, 1 << number, is_kept=bool(kept_here))
        slots[name.encode()] = slot
        if has_twins and kept_here:
            slots[snake_case(name).encode()] = slot
    return MemberScope(slots, each, has_twins=has_twins)


def snake_case(name: str) -> str:
    """The spelling of a camelCase name in snake_case."""
    return _HUMP.sub(lambda hump: "_" + hump.group().lower(), name)
