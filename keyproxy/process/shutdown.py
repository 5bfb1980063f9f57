"""When a process leaves: SIGTERM and `keyproxy drain` start it, SIGINT starts it and leaves out the lingering.

Further SIGTERMs change nothing: a service manager may send one to each process of a group, and the supervisor sends one
to its workers besides. What there is to wait for is bounded by listen.linger_seconds and listen.drain_seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal


class Departure:
    """See the module. To be made in the event loop of the process."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.is_urgent = asyncio.Event()

    def on_signals(self) -> None:
        """Begin at SIGTERM and SIGINT."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.begin)
        loop.add_signal_handler(signal.SIGINT, self.hurry)

    def begin(self) -> None:
        """Leave, after lingering."""
        self.begun.set()

    def hurry(self) -> None:
        """Leave, or stop lingering."""
        self.begun.set()
        self.is_urgent.set()

    @property
    def signal(self) -> signal.Signals:
        """The signal that makes another process shut down in the same way."""
        return signal.SIGINT if self.is_urgent.is_set() else signal.SIGTERM

    async def linger(self, seconds: float) -> None:
        """Wait for so long, or until it is urgent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.is_urgent.wait()
