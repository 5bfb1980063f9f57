"""Processes of keyproxy that the tests of a module share: they start without an event loop."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.conftest import clean_environment
from tests.waiting import wait_until


@dataclass
class Process:
    """A running process, and what it has printed."""

    running: subprocess.Popen[bytes]
    out: Path
    err: Path

    def wait_logged(self, text: str) -> None:
        """Wait until stderr has the text."""
        wait_until(lambda: text in self.err.read_text(encoding="utf-8"), f"{text!r} is logged")


@contextlib.contextmanager
def started(command: str, config: Path, live_url: str) -> Iterator[Process]:
    """A command until the context ends; it is live, and SIGTERM must end it with status 0 then."""
    out, err = (config.with_name(f"{command}.{kind}") for kind in ("out", "err"))
    arguments = [sys.executable, "-m", "keyproxy", command, "--config", str(config)]
    with out.open("wb") as out_file, err.open("wb") as err_file:
        running = subprocess.Popen(arguments, env=clean_environment(config.parent), stdout=out_file, stderr=err_file)
        try:
            wait_until(lambda: running.poll() is not None or responds(live_url), f"{command} is live", seconds=60)
            assert running.poll() is None, err.read_text(encoding="utf-8")
            yield Process(running, out, err)
            running.send_signal(signal.SIGTERM)
            # In the order of a parallel run, no test is the last one of a process.
            assert running.wait(30) == 0, err.read_text(encoding="utf-8")
        finally:
            running.kill()
            running.wait(30)


def responds(url: str) -> bool:
    """Whether a server responds at all."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
