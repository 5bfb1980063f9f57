"""Bound sockets for the addresses of the configuration: `host:port`, `[ipv6]:port`, `unix:/path`."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import os
import socket
import stat
import termios
from pathlib import Path
from typing import Final

from keyproxy.config import addresses
from keyproxy.config.addresses import IpAddress
from keyproxy.config.schema import Settings

#: The default mode of a unix socket.
_MODE: Final = 0o600


class BindError(Exception):
    """An address cannot be listened on. The message names it and the reason."""


def bind(address: str, *, mode: int = _MODE, is_shared: bool = True) -> socket.socket:
    """A socket bound to this address, not yet listening. Raises BindError.

    `mode`: of a unix socket's file. `is_shared`: other processes of this user may bind the same port (SO_REUSEPORT).
    """
    try:
        if address.startswith("unix:"):
            return _bind_unix(Path(address.removeprefix("unix:")), mode)
        return _bind_tcp(address, is_shared=is_shared)
    except OSError as error:
        raise BindError(f"cannot listen on {address}: {error.strerror or error}") from error


def address_of(sock: socket.socket) -> str:
    """The actual address of a bound socket: if the configured port is 0, with the port that the kernel chose."""
    name = sock.getsockname()
    if isinstance(name, bytes):
        return "a private socket"
    if isinstance(name, str):
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


def conflicts(settings: Settings) -> list[str]:
    """One sentence for each address that overlaps another one. Resolves names, unlike `settings.cross_checks`."""
    listeners = {
        name: f"unix:{os.path.realpath(address[5:])}" if address.startswith("unix:") else address
        for name, address in settings.listeners().items()
    }
    upstreams = {
        name: f"unix:{os.path.realpath(url[5:])}" if url.startswith("unix:") else url
        for name, url in settings.upstream_urls().items()
    }
    return addresses.conflicts(listeners, upstreams, resolve=resolved, is_local=is_local)


def resolved(host: str) -> frozenset[IpAddress | str]:
    """All IP addresses of a host. A name that cannot be resolved stays as it is: it may be resolved later."""
    known = addresses.literal(host)
    if not any(isinstance(one, str) for one in known):
        return known
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return known
    return frozenset(addresses.plain(ipaddress.ip_address(where[0])) for *_, where in found)


def is_local(address: IpAddress) -> bool:
    """Whether an address belongs to this machine, so that it can be bound."""
    if address.is_loopback:
        return True
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def untaken_bytes(fd: int) -> int:
    """The number of bytes written to a socket that its peer has not taken; 0 if that cannot be determined.

    For TCP the unacknowledged bytes, for a unix socket the memory held for unread bytes.
    """
    held = array.array("i", [0])
    try:
        # SIOCOUTQ, which has the number of TIOCOUTQ.
        fcntl.ioctl(fd, termios.TIOCOUTQ, held, True)
    except OSError:
        return 0
    return held[0]


def _bind_tcp(address: str, *, is_shared: bool) -> socket.socket:
    host, _, port = address.rpartition(":")
    family, kind, protocol, _, where = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            # Workers share the port, and so do the old and the new process of a rolling restart.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(where)
    except OSError:
        sock.close()
        raise
    return sock


def _bind_unix(path: Path, mode: int) -> socket.socket:
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _is_listened_on(path):
        path.unlink()  # left behind by a process that was killed
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Linux creates the file with the mode of the socket less the umask: never wider than configured.
        os.fchmod(sock.fileno(), mode)
        sock.bind(str(path))
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
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
