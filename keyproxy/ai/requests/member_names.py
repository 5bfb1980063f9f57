"""The names in a request's JSON that determine its token bound, and spellings that some parsers treat as equal."""

from __future__ import annotations

from typing import Any, Final

_MAXIMUMS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_TIMES: Final = ("n", "best_of")
#: Names that a request may contain once, in this spelling only.
DECISIVE: Final = frozenset({*_MAXIMUMS, *_TIMES, "stream", "stream_options", "include_usage", "prompt"})
#: Java's equalsIgnoreCase takes the Turkish i, with a dot or without, in capitals or not, for the Latin one.
_DOT_ABOVE: Final = "\u0307"
#: Names with significant values, however often they appear.
_OTHERS: Final = frozenset({"messages", "input", "tools"})


class Outline:
    """Facts about a request's members that do not depend on their values."""

    __slots__ = (
        "has_options", "has_prompt", "has_stream", "has_type", "is_ambiguous", "is_flat", "maximums", "spelt", "times",
    )  # fmt: skip

    def __init__(self, found: int) -> None:
        """`found`: bits of _BITS, _AMBIGUOUS and _NESTED."""
        there = [name for name, bit in _BITS.items() if found & bit]
        self.maximums: Final = tuple([name for name in _MAXIMUMS if name in there])
        self.times: Final = tuple([name for name in _TIMES if name in there])
        self.has_stream: Final = "stream" in there
        self.has_options: Final = "stream_options" in there
        self.has_prompt: Final = "prompt" in there
        self.has_type: Final = "type" in there
        #: The significant names as they appear in the body, if no other spelling does.
        self.spelt: Final = tuple([f'"{name}"'.encode() for name in there if name in DECISIVE])
        self.is_ambiguous: Final = bool(found & _AMBIGUOUS)
        self.is_flat: Final = not found & _NESTED


#: A bit for each significant name, one for all names that some parsers take for a significant one, and one for values
#: that have members of their own.
_BITS: Final[dict[str, int]] = {name: 1 << place for place, name in enumerate(sorted({*DECISIVE, "type"}))}
_AMBIGUOUS: Final = 1 << len(_BITS)
_NESTED: Final = 2 << len(_BITS)

#: The bits of each name seen so far: requests to one API use the same few. Emptied when full.
_met: Final[dict[str, int]] = {}
_MET_MAX: Final = 4_096
_MET_CHARACTERS_MAX: Final = 64
#: By the combined bits of all members.
_outlines: Final[dict[int, Outline]] = {}


def outline_of(document: dict[str, Any]) -> Outline:
    """Return the facts about these members."""
    found = 0
    for name, value in document.items():
        bits = _met.get(name)
        found |= _meet(name) if bits is None else bits
        # Separate checks: the compiled build tests each class directly, but would create a union type on every call.
        if isinstance(value, dict) or isinstance(value, list):  # noqa: SIM101
            found |= _NESTED
    outline = _outlines.get(found)
    if outline is None:
        outline = _outlines[found] = Outline(found)
    return outline


def _meet(name: str) -> int:
    bits = _BITS.get(name, _AMBIGUOUS if _is_ambiguous(name) else 0)
    if len(name) <= _MET_CHARACTERS_MAX:
        if len(_met) >= _MET_MAX:
            _met.clear()
        _met[name] = bits
    return bits


def matters(name: str) -> bool:
    """Whether anything depends on a member of this name."""
    bits = _met.get(name)
    return bool(_meet(name) if bits is None else bits) or name in _OTHERS


def _is_ambiguous(name: str) -> bool:
    """Whether parsers differ in treating it as a significant name. For parsers in C a NUL ends a name."""
    if name in DECISIVE:
        return False
    return name.partition("\0")[0].upper().casefold().replace(_DOT_ABOVE, "") in DECISIVE
