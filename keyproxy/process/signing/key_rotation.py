"""Makes the signing keys of a proxy, one at start and one every 24 hours.

The supervisor makes them for all its workers; a proxy of one process makes its own. They are in memory only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from keyproxy.platform import clock
from keyproxy.signing.signing_key import SigningKey

_ROTATION_SECONDS: Final = 24 * 3600.0

#: How often the wall clock is compared: it may jump, and a machine may be suspended.
_LOOK_SECONDS: Final = 10.0

#: The longest that anything signed here is valid: an agent token, and a few seconds.
_SIGNED_SECONDS_MAX: Final = 905.0


class KeyRotation:
    """The keys of this proxy that have not ended, the oldest first."""

    def __init__(self, wall: Callable[[], float] = clock.wall) -> None:
        self._wall = wall
        self.keys = [SigningKey.make(wall())]
        #: Until when what a key has signed elsewhere is valid, by `kid`.
        self._signed_until: dict[str, float] = {}

    async def run(self, made: Callable[[], None]) -> None:
        """Make new keys until cancelled; call `made` after each."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self.rotate():
                made()

    def rotate(self) -> bool:
        """Make a new key if it is due. Returns whether there is one."""
        wall = self._wall()
        if wall < self.keys[-1].created_wall_seconds + _ROTATION_SECONDS:
            return False
        self.keys = [key for key in self.keys if wall < key.ends_wall_seconds]
        self.keys.append(SigningKey.make(wall))
        return True

    def private_texts(self) -> list[str]:
        """The keys with their private halves, for the control channel."""
        return [key.private_text() for key in self.keys]

    def was_signed(self, signed_until: Mapping[str, float] | None) -> None:
        """A worker that has exited has signed until then, by `kid`. None: it crashed, so the longest possible."""
        if signed_until is None:
            signed_until = {key.kid: self._wall() + _SIGNED_SECONDS_MAX for key in self.keys}
        for kid, until in signed_until.items():
            self._signed_until[kid] = max(until, self._signed_until.get(kid, 0.0))

    def ends(self) -> dict[str, float]:
        """When the keys may end if nothing more is signed, by `kid`: at the end of what was signed last."""
        wall = self._wall()
        return {
            key.kid: max(wall, key.signed_until_wall_seconds, self._signed_until.get(key.kid, 0.0)) for key in self.keys
        }
