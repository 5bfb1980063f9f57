"""Limits as callers see them: policy, remaining quota, and the RateLimit header fields.

`RateLimit-Policy` lists the limits that apply, `RateLimit` what remains of each: draft-ietf-httpapi-ratelimit-headers,
lists of RFC 9651 strings with parameters. A policy never changes, so its item is formatted once.

    RateLimit-Policy: "requests-per-day";q=1000;w=86400, "concurrency";q=8;qu="concurrent-requests"
    RateLimit: "requests-per-day";r=412;t=3600, "concurrency";r=7
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

#: Units of the draft's registry, and our own for tokens and money; a policy in requests omits its unit.
REQUESTS: Final = "requests"
CONCURRENT_REQUESTS: Final = "concurrent-requests"
TOKENS: Final = "tokens"
MONEY: Final = "micro-units"

#: The largest Integer of RFC 9651 section 3.3.1. Larger values are clamped to it: they are as good as unlimited.
_INTEGER_MAX: Final = 999_999_999_999_999

#: The number of policies, and of RateLimit-Policy lines, that are cached and shared.
_KEPT_MAX: Final = 1_024

_UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}")
#: A name may end with a selector: printable ASCII without quotes and backslashes, which would need escapes.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}(?:@[\x20\x21\x23-\x5b\x5d-\x7e]{1,300})?")


@dataclass(frozen=True, slots=True)
class LimitPolicy:
    """One limit: at most `quota` of `unit` in `window_seconds`; None: at any one time, or in all.

    Raises ValueError for a name that is not a plain word, a negative quota, or a window shorter than a second.
    """

    name: str
    quota: int
    window_seconds: int | None = None
    unit: str = REQUESTS
    item: bytes = field(init=False, repr=False, compare=False)
    key: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or not _UNIT.fullmatch(self.unit):
            raise ValueError(f"{self.name!r} in {self.unit!r}: a name may contain only letters, digits and _ . : / -")
        if self.quota < 0 or (self.window_seconds is not None and self.window_seconds < 1):
            raise ValueError(f"{self.name}: the quota is negative, or the window is shorter than a second")
        key = f'"{self.name}"'
        window = "" if self.window_seconds is None else f";w={_integer(self.window_seconds)}"
        unit = "" if self.unit == REQUESTS else f';qu="{self.unit}"'
        object.__setattr__(self, "key", key.encode("ascii"))
        object.__setattr__(self, "item", f"{key};q={_integer(self.quota)}{window}{unit}".encode("ascii"))


@lru_cache(maxsize=_KEPT_MAX)
def policy(name: str, quota: int, window_seconds: int | None = None, unit: str = REQUESTS) -> LimitPolicy:
    """A LimitPolicy, shared by all users with the same limit: plans are few, users many. Raises ValueError."""
    return LimitPolicy(name, quota, window_seconds, unit)


class LimitState(NamedTuple):
    """A limit at one moment. `remaining` may be negative after a plan was reduced; callers see 0.

    `reset_seconds`: the time until the quota is replenished, in full or in part; None if it never is by time alone.
    """

    policy: LimitPolicy
    remaining: int
    reset_seconds: float | None = None

    @property
    def remaining_shown(self) -> int:
        """The remaining quota as callers see it."""
        return max(0, self.remaining)

    @property
    def reset_seconds_shown(self) -> int | None:
        """The reset in whole seconds, rounded up so that a client that waits this long does not retry too early."""
        return None if self.reset_seconds is None else max(0, math.ceil(self.reset_seconds))


@lru_cache(maxsize=_KEPT_MAX)
def policy_line(policies: tuple[LimitPolicy, ...]) -> bytes:
    """The RateLimit-Policy line of these limits, shared by all users with the same ones; empty if there are none."""
    if not policies:
        return b""
    return b"RateLimit-Policy: %b\r\n" % b", ".join([policy.item for policy in policies])


def state_line(states: Sequence[LimitState]) -> bytes:
    """The RateLimit line of these limits in their current state; empty if there are none."""
    if not states:
        return b""
    return b"RateLimit: %b\r\n" % b", ".join([_state_item(state) for state in states])


def lines(states: Sequence[LimitState]) -> bytes:
    """The RateLimit-Policy and RateLimit lines."""
    return policy_line(tuple([state.policy for state in states])) + state_line(states)


def _state_item(state: LimitState) -> bytes:
    reset_seconds = state.reset_seconds_shown
    reset = b"" if reset_seconds is None else b";t=%d" % reset_seconds
    return b"%b;r=%d%b" % (state.policy.key, _integer(state.remaining_shown), reset)


def _integer(value: int) -> int:
    return min(value, _INTEGER_MAX)
