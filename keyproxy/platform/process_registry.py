"""Find running keyproxy processes on this machine: abstract unix sockets whose names encode what they serve.

An abstract name needs no writable directory, vanishes with its process, and belongs to a network namespace, as ports do:
every process that can share a port with this one is found. The name contains no secret, only addresses and a digest.

Any user may create such a name. A process counts only if the kernel reports that it runs as this user (SO_PEERCRED);
another user's process could not share a port anyway.

Health checks run every few seconds, so this module imports nothing slow.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from typing import Final, NamedTuple

SERVE: Final = "serve"
ADMIN: Final = "admin"
AUTHORIZE: Final = "authorize"

HEALTH: Final = b"health\n"
LIVE: Final = b"live\n"
DRAIN: Final = b"drain\n"
DRAINING: Final = b"draining\n"
DRAINED: Final = b"drained\n"

#: First byte of a unix socket's place. As an IP address it would be a multicast group, which has no listener.
UNIX: Final = b"\xff"
#: The place of an absent listener.
NOWHERE: Final = "A" * 24

_PREFIX: Final = "keyproxy/1/"
_NAME: Final = re.compile(
    r"keyproxy/1/(serve|admin|authorize)/([\w-]{24})/([\w-]{24})/([0-9a-f]{16})/[0-9]{1,10}-[0-9a-f]{8}", re.ASCII
)
_CREDENTIALS: Final = struct.Struct("3i")
_RESPONSE_SECONDS: Final = 2.0


class Presence(NamedTuple):
    """What a process serves: its purpose, its listeners as `encoded`, and a digest of its upstreams and database."""

    purpose: str
    main: str
    ops: str
    serves: str

    def name(self) -> str:
        """A unique name for an abstract socket."""
        unique = f"{os.getpid()}-{os.urandom(4).hex()}"
        return f"{_PREFIX}{self.purpose}/{self.main}/{self.ops}/{self.serves}/{unique}"


class Running(NamedTuple):
    """A running process. `pid` 0: it is in another pid namespace, such as that of another container."""

    presence: Presence
    name: str
    pid: int
    uid: int


def running() -> list[Running]:
    """The processes of this user on this machine. Root sees those of other users if it has none."""
    found = []
    # Connections to an abstract socket are listed under its name too.
    for name in sorted(_names()):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        sock = connected(name)
        if sock is None:
            continue
        with sock:
            pid, uid = peer(sock)
        found.append(Running(Presence(match[1], match[2], match[3], match[4]), name, pid, uid))
    return [one for one in found if one.uid == os.geteuid()] or found


def connected(name: str) -> socket.socket | None:
    """Connect to a process; None if that name does not exist or belongs to another user."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_RESPONSE_SECONDS)
        sock.connect(f"\0{name}")
        # Root may connect to the processes of all users.
        if os.geteuid() == 0 or is_trusted(sock):
            return sock
    except OSError:
        pass  # it has exited meanwhile, or does not accept
    sock.close()
    return None


def peer(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def is_trusted(sock: socket.socket) -> bool:
    """Whether the other end runs as this user or as root."""
    return peer(sock)[1] in (os.geteuid(), 0)


def here(*purposes: str) -> list[Running]:
    """The running processes of this user in this pid namespace: in a container, those of the container."""
    return [one for one in running() if one.pid and (not purposes or one.presence.purpose in purposes)]


def of_addresses(mains: Mapping[str, str]) -> list[Running]:
    """The running processes that listen on the address of their purpose. Raises OSError for an invalid address."""
    wanted = {(purpose, encoded(address)) for purpose, address in mains.items()}
    return [one for one in running() if (one.presence.purpose, one.presence.main) in wanted]


def is_live(one: Running) -> bool:
    """Whether the event loop of a process responds."""
    return query(one.name, HEALTH) == LIVE


def query(name: str, request: bytes) -> bytes:
    """The response of a process to a request; empty if it times out."""
    sock = connected(name)
    if sock is None:
        return b""
    with sock:
        try:
            sock.sendall(request)
            return sock.recv(64)
        except OSError:
            return b""


def encoded(address: str) -> str:
    """An address of the configuration in 24 characters; names are resolved as for listening. Raises OSError."""
    if address.startswith("unix:"):
        import hashlib  # takes long to import, and most listeners are ports

        packed = UNIX + hashlib.sha256(os.path.realpath(address[5:]).encode()).digest()[:17]
    else:
        host, _, port = address.rpartition(":")
        packed = _packed(host.strip("[]")) + struct.pack("!H", int(port))
    return urlsafe_b64encode(packed).decode("ascii")


def _packed(host: str) -> bytes:
    family, *_, where = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    packed = socket.inet_pton(family, str(where[0]).partition("%")[0])
    return packed if family == socket.AF_INET6 else b"\0" * 10 + b"\xff\xff" + packed


def _names() -> set[str]:
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - pathlib takes long
            lines = file.read().splitlines()
    except OSError:
        return set()
    return {line[at + 1 :] for line in lines if (at := line.find(f"@{_PREFIX}")) >= 0}
