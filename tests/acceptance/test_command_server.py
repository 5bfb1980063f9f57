"""Processes that are forked for tests behave as those that users start."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.acceptance.conftest import Site
from tests.acceptance.fleet import beside


async def test_forked_processes_share_no_opened_or_pipes(site: Site) -> None:
    async with site.serving() as one, beside(site, site.dsn).serving() as other:
        assert _opened(one.pid)
        assert not _opened(one.pid) & _opened(other.pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_signal_ends_a_forked_process_and_leaves_no_zombie(site: Site, number: int) -> None:
    async with site.serving() as process:
        os.kill(process.pid, number)
        assert await process.wait() == process.returncode == (-number if number == signal.SIGKILL else 0)
        assert not Path(f"/proc/{process.pid}").exists()
        with pytest.raises(ProcessLookupError):
            process.kill()


def _opened(pid: int) -> set[str]:
    links = (str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir())
    return {link for link in links if link.startswith(("socket:", "pipe:"))}
