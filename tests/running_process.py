"""A process that a test has started, however it was started."""

from __future__ import annotations

from typing import Protocol


class RunningProcess(Protocol):
    """What tests use of `asyncio.subprocess.Process`."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """The exit status, negative after a signal; None while the process runs."""
        ...

    async def wait(self) -> int:
        """Wait for its end."""
        ...

    def send_signal(self, signal: int, /) -> None:
        """Raises ProcessLookupError after its end."""
        ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...
