"""A request body that has to be whole before anything is decided about it."""

from __future__ import annotations

import asyncio
from typing import Final

from keyproxy.reasons import Reason, Refusal

#: More is not read whole: it would be memory that a client may have us hold for as long as it likes.
WHOLE_BYTES_MAX: Final = 33_554_432


class Collector:
    """Takes a body in pieces; `wait` ends when it is whole, or nobody wants it any more."""

    def __init__(self, begun: bytes, announced_bytes: int = 0, too_much: Refusal | None = None) -> None:
        """`too_much`: what is told of a body that is too large; raised if it is announced to be."""
        self._too_much = too_much or Refusal(Reason.BODY_TOO_LARGE, "a body that has to be read whole")
        if announced_bytes > WHOLE_BYTES_MAX:
            raise self._too_much
        self._content = bytearray(begun)
        self._is_over = asyncio.get_running_loop().create_future()

    def take(self, content: bytes) -> None:
        """The next piece. Raises a Refusal if it becomes too much."""
        self._content += content
        if len(self._content) > WHOLE_BYTES_MAX:
            raise self._too_much

    def end(self) -> bytes:
        """The body, as far as it has come."""
        if not self._is_over.done():
            self._is_over.set_result(None)
        return bytes(self._content)

    async def wait(self) -> None:
        """Until `end` was called."""
        await self._is_over
