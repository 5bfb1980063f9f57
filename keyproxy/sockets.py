"""Bound sockets for the addresses of the configuration: `host:port`, `[ipv6]:port`, `unix:/path`."""

from __future__ import annotations

import array
import fcntl
import socket
import stat
import termios
from pathlib import Path


class BindError(Exception):
    """An address cannot be listened on. The text says which and why."""


def bind(address: str) -> socket.socket:
    """A socket bound to this address, not yet listening. Raises BindError."""
    try:
        return _bind_unix(Path(address.removeprefix("unix:"))) if address.startswith("unix:") else _bind_tcp(address)
    except OSError as error:
        raise BindError(f"cannot listen on {address}: {error.strerror or error}") from error


def told(sock: socket.socket) -> str:
    """The address that a bound socket really has: with the port it got where 0 was asked for."""
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


def untaken_bytes(fd: int) -> int:
    """How much of what was written to a socket its peer has not taken; 0 where that cannot be found out.

    Of TCP what the peer has not acknowledged, of a unix socket the memory that is held for what it has not read.
    """
    held = array.array("i", [0])
    try:
        # SIOCOUTQ, which has the number of TIOCOUTQ.
        fcntl.ioctl(fd, termios.TIOCOUTQ, held, True)
    except OSError:
        return 0
    return held[0]


def _bind_tcp(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    family, kind, protocol, _, where = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Workers share the port, and so do the old and the new process of a rolling restart.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(where)
    except OSError:
        sock.close()
        raise
    return sock


def _bind_unix(path: Path) -> socket.socket:
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _is_listened_on(path):
        path.unlink()  # left behind by a process that was killed
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def _is_listened_on(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True
