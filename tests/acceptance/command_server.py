"""Runs commands in processes that are forked from one that has imported keyproxy: a command takes as long as its work.

Started as a program, it serves one socket. A request is the command line, the environment and the working directory in
JSON, with the descriptors of the command's stdin, stdout and stderr; the response is its exit status.
"""

from __future__ import annotations

import gc
import json
import os
import select
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
from keyproxy import cli

_REQUEST_BYTES_MAX: Final = 1 << 20
_LENGTH_BYTES: Final = 4

#: A program that takes the place of `keyproxy` in a shell.
_CLIENT: Final = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.connect({path!r})
    request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(client, [len(request).to_bytes({length})], [0, 1, 2])
    client.sendall(request)
    status = client.recv({length})
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
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(seconds)
                client.connect(self._path)
                request = json.dumps([list(arguments), dict(environment), str(Path.cwd())]).encode()
                socket.send_fds(
                    client, [len(request).to_bytes(_LENGTH_BYTES)], [file.fileno() for file in (given, out, err)]
                )
                client.sendall(request)
                status = client.recv(_LENGTH_BYTES)
            assert len(status) == _LENGTH_BYTES, "the process that runs commands has failed"
            return int.from_bytes(status, signed=True), _content(out), _content(err)

    @property
    def program(self) -> str:
        """A program that runs its command line here, with its own streams, environment and directory."""
        return _CLIENT.format(python=sys.executable, path=self._path, length=_LENGTH_BYTES)

    def close(self) -> None:
        """End the server."""
        self._process.communicate()
        self._directory.cleanup()


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _serve(listener: socket.socket) -> None:
    """Serve requests, each in a process of its own, until the process that started this one ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    ends = os.dup(0)
    while ends not in select.select([listener.fileno(), ends], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            os.close(ends)
            _execute(connection)
            os._exit(0)
        connection.close()


def _execute(connection: socket.socket) -> None:
    """Run the command in a further process, which ends as any does, and send its status."""
    start, descriptors, *_ = socket.recv_fds(connection, _LENGTH_BYTES, 3)
    length, request = int.from_bytes(start), b""
    while len(request) < length:
        request += connection.recv(_REQUEST_BYTES_MAX)
    arguments, environment, directory = json.loads(request)
    command = os.fork()
    if command == 0:
        connection.close()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = arguments
        raise _Command
    _, status = os.waitpid(command, 0)
    connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(_LENGTH_BYTES, signed=True))


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
        _serve(socket.socket(fileno=int(sys.argv[1])))
    except _Command:
        is_command = True
    else:
        is_command = False
    if is_command:
        keyproxy.__main__.main()


if __name__ == "__main__":
    _main()
