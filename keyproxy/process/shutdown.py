"""Graceful shutdown: SIGTERM and `keyproxy drain` start it, SIGINT starts it and skips the lingering.

Further SIGTERMs have no effect: a service manager may send one to each process of a group, and the supervisor sends one
to each worker as well. listen.linger_seconds and listen.drain_seconds bound the time that a shutdown takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal


class Shutdown:
    """The shutdown state of a process. Create it in the event loop of the process."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.is_urgent = asyncio.Event()

    def on_signals(self) -> None:
        """Start the shutdown at SIGTERM and SIGINT."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.begin)
        loop.add_signal_handler(signal.SIGINT, self.skip_linger)

    def begin(self) -> None:
        """Start the shutdown, with lingering."""
        self.begun.set()

    def skip_linger(self) -> None:
        """Start the shutdown without lingering, or end the lingering of one that has started."""
        self.begun.set()
        self.is_urgent.set()

    @property
    def signal(self) -> signal.Signals:
        """The signal that makes another process shut down in the same way."""
        return signal.SIGINT if self.is_urgent.is_set() else signal.SIGTERM

    async def linger(self, seconds: float) -> None:
        """Wait for this time, or until the shutdown is urgent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.is_urgent.wait()
