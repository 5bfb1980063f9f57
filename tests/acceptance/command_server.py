"""Runs commands in processes that are forked from one that has imported keyproxy: a command takes as long as its work.

Started as a program, it serves one socket. A request is the command line, the environment and the working directory in
JSON, with the descriptors of stdin, stdout and stderr; the response is the process id, then the exit status.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final

import click

import keyproxy.__main__

# What the commands that serve import when they run.
import keyproxy.admin.app
import keyproxy.authorize.app
import keyproxy.process.run
import keyproxy.process.supervisor
from keyproxy import cli
from tests.running_process import RunningProcess

_REQUEST_BYTES_MAX: Final = 1 << 20
_NUMBER_BYTES: Final = 4

#: A program that takes the place of `keyproxy` in a shell.
_CLIENT: Final = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.connect({path!r})
    request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(client, [len(request).to_bytes({length})], [0, 1, 2])
    client.sendall(request)
    client.recv({length}, socket.MSG_WAITALL)
    status = client.recv({length}, socket.MSG_WAITALL)
assert len(status) == {length}, "the process that runs commands has failed"
sys.exit(int.from_bytes(status, signed=True))
"""


class CommandServer:
    """The client's side. The server ends with this process, or at `close`."""

    def __init__(self, root: Path) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp")
        self._path = f"{self._directory.name}/commands"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._path)
            listener.listen(16)
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(listener.fileno())],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
                cwd=root,
            )

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], stdin: bytes | None, *, seconds: float
    ) -> tuple[int, bytes, bytes]:
        """Run a command to completion: its exit status, stdout and stderr. Blocks."""
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin or b"")
            given.seek(0)
            descriptors = [file.fileno() for file in (given, out, err)]
            with self._request(arguments, environment, descriptors, seconds=seconds) as client:
                _number(client)
                return _number(client), _content(out), _content(err)

    async def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, out: int, err: int, seconds: float
    ) -> ForkedProcess:
        """Start a command with these descriptors as stdout and stderr, and without a stdin."""
        with Path(os.devnull).open("rb") as empty:
            client = self._request(arguments, environment, [empty.fileno(), out, err], seconds=seconds)
        pid = _number(client)
        client.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=client)
        return ForkedProcess(pid, reader, writer)

    @property
    def program(self) -> str:
        """A program that runs its command line here, with its own streams, environment and directory."""
        return _CLIENT.format(python=sys.executable, path=self._path, length=_NUMBER_BYTES)

    def close(self) -> None:
        """End the server."""
        self._process.communicate()
        self._directory.cleanup()

    def _request(
        self, arguments: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], *, seconds: float
    ) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(seconds)
        client.connect(self._path)
        request = json.dumps([list(arguments), dict(environment), str(Path.cwd())]).encode()
        socket.send_fds(client, [len(request).to_bytes(_NUMBER_BYTES)], list(descriptors))
        client.sendall(request)
        return client


class ForkedProcess(RunningProcess):
    """A process of the server, as `asyncio.subprocess.Process` shows one."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self._returncode: int | None = None
        self._ended = asyncio.create_task(self._end(reader, writer))

    @property
    def returncode(self) -> int | None:
        """The exit status, negative after a signal; None while the process runs."""
        return self._returncode

    async def wait(self) -> int:
        """Wait for its end."""
        return await asyncio.shield(self._ended)

    def send_signal(self, signal: int, /) -> None:
        """Raises ProcessLookupError after its end."""
        if self._returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, signal)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def _end(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        try:
            self._returncode = int.from_bytes(await reader.readexactly(_NUMBER_BYTES), signed=True)
        finally:
            writer.close()
        return self._returncode


def _number(client: socket.socket) -> int:
    number = client.recv(_NUMBER_BYTES, socket.MSG_WAITALL)
    assert len(number) == _NUMBER_BYTES, "the process that runs commands has failed"
    return int.from_bytes(number, signed=True)


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


class _Forks:
    """The server's side."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self._ends = listener, os.dup(0)
        self._running: dict[int, tuple[int, socket.socket]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._ends, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve requests until the process that started this one ends. Raises _Command in the process of a command."""
        while True:
            for key, _ in self._selector.select():
                if key.fd == self._ends:
                    return
                if key.fd in self._running:
                    self._report(key.fd)
                else:
                    self._accept()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        start, descriptors, *_ = socket.recv_fds(connection, _NUMBER_BYTES, 3)
        length, request = int.from_bytes(start), b""
        while len(request) < length:
            request += connection.recv(_REQUEST_BYTES_MAX)
        pid = os.fork()
        if pid == 0:
            connection.close()
            self._close()
            _become(descriptors, *json.loads(request))
            raise _Command
        for descriptor in descriptors:
            os.close(descriptor)
        ended = os.pidfd_open(pid)
        self._running[ended] = pid, connection
        self._selector.register(ended, selectors.EVENT_READ)
        _send(connection, pid)

    def _report(self, ended: int) -> None:
        self._selector.unregister(ended)
        os.close(ended)
        pid, connection = self._running.pop(ended)
        _, status = os.waitpid(pid, 0)
        with connection:
            _send(connection, os.waitstatus_to_exitcode(status))

    def _close(self) -> None:
        for ended, (_, connection) in self._running.items():
            os.close(ended)
            connection.close()
        self._selector.close()
        self._listener.close()
        os.close(self._ends)


def _send(connection: socket.socket, number: int) -> None:
    try:
        connection.sendall(number.to_bytes(_NUMBER_BYTES, signed=True))
    except OSError:
        # The client does not wait for the process.
        return


def _become(descriptors: Sequence[int], arguments: Sequence[str], environment: dict[str, str], directory: str) -> None:
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments


class _Command(BaseException):
    """This process is a command: it leaves the server's loop."""


def _import_commands(group: click.Group) -> None:
    """Import the modules of all commands, which import what they need."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            _import_commands(command)


def _main() -> None:
    _import_commands(cli.root)
    gc.freeze()
    try:
        _Forks(socket.socket(fileno=int(sys.argv[1]))).serve()
    except _Command:
        is_command = True
    else:
        is_command = False
    if is_command:
        keyproxy.__main__.main()


if __name__ == "__main__":
    _main()
