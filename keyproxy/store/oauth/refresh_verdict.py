"""What the use of a refresh token means: the next one in turn, a repetition, or a stolen token.

A client may lose a response, and several processes of one client may share a token. Both repeat a use that was honest,
so a token works again for a moment, and later as long as no successor of it was used. RFC 9700 section 4.14.2 describes
the rotation that this refines.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

#: How many refresh tokens may follow one.
SUCCESSORS_MAX: Final = 8


class RefreshVerdict(enum.Enum):
    """What follows from the use of a refresh token."""

    REUSE = "reuse"  # its session ends
    ROTATE = "rotate"  # a successor is issued
    TOO_MANY = "too many"  # refused; the session lives
    REPEAT = "repeat"  # another successor is issued beside the earlier ones
    REPLACE = "replace"  # another successor is issued in place of the earlier ones


@dataclass(frozen=True, slots=True)
class RefreshUse:
    """The state of a refresh token that is presented. `is_past_grace`: it was used longer ago than the grace.

    `successors`: how many refresh tokens follow it, replaced ones included.
    """

    is_replaced: bool
    is_used: bool
    is_past_grace: bool
    successors: int
    has_used_successor: bool


def judge_refresh(use: RefreshUse, *, grace_seconds: int) -> RefreshVerdict:
    """The verdict on a use. Without a grace, every second use is a reuse."""
    if use.is_replaced or _is_reuse(use, grace_seconds):
        return RefreshVerdict.REUSE
    if not use.is_used:
        return RefreshVerdict.ROTATE
    if use.successors >= SUCCESSORS_MAX:
        return RefreshVerdict.TOO_MANY
    return RefreshVerdict.REPLACE if use.is_past_grace else RefreshVerdict.REPEAT


def _is_reuse(use: RefreshUse, grace_seconds: int) -> bool:
    if not use.is_used:
        return False
    if grace_seconds == 0:
        return True
    return use.is_past_grace and (use.has_used_successor or use.successors >= SUCCESSORS_MAX)
