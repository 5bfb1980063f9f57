"""End asyncio tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final

#: A cancellation that coincides with a timeout can be lost in a library: it is repeated after this time.
_CANCEL_AGAIN_SECONDS: Final = 0.5


async def cancel_all(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for them, however often one loses its cancellation.

    Not for a task that needs longer than that to clean up: repeating its cancellation would interrupt it.
    """
    cancelled = tuple(tasks)
    pending = set(cancelled)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*cancelled, return_exceptions=True)
