"""The members of a request that count, and the spellings that some parsers take for them.

A member counts once, in one spelling: servers differ in which of two they read, and some ignore case, end a name at a
NUL, or accept camelCase and snake_case. JSON escapes do not make another name: names are compared decoded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from keyproxy.ai.dialects.endpoint import EACH, Dialect, MemberPath
from keyproxy.ai.scanning.member_meanings import MEANINGS, NO_MEANING

#: Members with other models that the upstream may use instead.
ALTERNATIVES: Final = ("models", "fallbacks", "context_window_fallbacks", "content_policy_fallbacks")

#: Java's equalsIgnoreCase takes the Turkish i, with a dot or without, in capitals or not, for the Latin one.
_DOT_ABOVE: Final = "\u0307"

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
    """A member that counts. `path`: its names, outermost first, in the dialect's own spelling, joined by dots."""

    __slots__ = ("path", "scope")

    def __init__(self, path: str, scope: MemberScope | None) -> None:
        self.path: Final = path
        #: The members that count in its value.
        self.scope: Final = scope


class Name:
    """What a decoded name is in one scope. `slot`: None unless it counts. `meaning`: one of `member_meanings`."""

    __slots__ = ("meaning", "slot")

    def __init__(self, slot: Slot | None, meaning: int) -> None:
        self.slot: Final = slot
        self.meaning: Final = meaning


class MemberScope:
    """The members of one object that count.

    `known`: names that have occurred, by their bytes in JSON, which are also the decoded name: those with escapes are
    left out, because they are different names with the same bytes.
    """

    __slots__ = ("_folded", "_slots", "known")

    def __init__(self, slots: dict[bytes, Slot]) -> None:
        """`slots`: by each spelling, decoded."""
        self.known: Final[dict[bytes, Name]] = {}
        self._slots: Final = slots
        self._folded: Final = {folded(name.decode("utf-8")): name.decode("utf-8") for name in slots}

    def name(self, name: bytes) -> Name:
        """Look up a decoded name. Raises AmbiguousNameError."""
        known = self.known
        found = known.get(name)
        if found is not None:
            return found
        slot = self._slots.get(name)
        if slot is None and self._slots:
            meant = self._folded.get(folded(name.decode("utf-8")))
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


def scope_of(dialect: Dialect, model_member: str = "model", judged: tuple[MemberPath, ...] = ()) -> MemberScope:
    """Build the scope of a request's outermost object, once per route. `model_member`: the member with the model;
    `judged`: further members that count.

    A member `model` counts on every metered route: it must not name another model than the route's source.
    """
    paths: list[MemberPath] = [(model_member,), ("model",), *((name,) for name in ALTERNATIVES), *_until_arrays(judged)]
    for row in (*dialect.endpoints, dialect.usual):
        paths += [*row.maximums, *row.multipliers]
        if row.prompts:
            paths.append((row.prompts,))
        if row.adds_include_usage:
            paths.append(("stream_options", "include_usage"))
    paths += dialect.thinking
    if dialect.streams_by_member:
        paths.append(("stream",))
    return _scope(paths, "", has_twins=dialect.has_twins)


def scope_of_paths(paths: Sequence[MemberPath]) -> MemberScope:
    """Build the scope of an outermost object of which these members count."""
    return _scope(_until_arrays(paths), "", has_twins=False)


def _until_arrays(paths: Sequence[MemberPath]) -> list[MemberPath]:
    found = [path[: path.index(EACH)] if EACH in path else path for path in paths]
    return [path for path in found if path]


def _scope(paths: list[MemberPath], prefix: str, *, has_twins: bool) -> MemberScope:
    slots: dict[bytes, Slot] = {}
    for first in dict.fromkeys([path[0] for path in paths]):
        inner = [path[1:] for path in paths if path[0] == first and len(path) > 1]
        path = prefix + first
        slot = Slot(path, _scope(inner, f"{path}.", has_twins=has_twins) if inner else None)
        slots[first.encode()] = slot
        if has_twins:
            slots[snake_case(first).encode()] = slot
    return MemberScope(slots)


def snake_case(name: str) -> str:
    """The spelling of a camelCase name in snake_case."""
    return _HUMP.sub(lambda hump: "_" + hump.group().lower(), name)
