"""How running processes of keyproxy are found on this machine: abstract unix sockets whose names say what they serve.

An abstract name needs no writable directory, goes away with its process, and belongs to a network namespace, as ports do:
whatever can share a port with this process is found. The name holds no secret: addresses and a digest.

Anybody may make such a name. A process counts only if the kernel says that it runs as this user (SO_PEERCRED); another
user's process could not share a port either.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import os
import re
import secrets
import socket
import struct
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from keyproxy import addresses, sockets
from keyproxy.addresses import Place
from keyproxy.settings import Settings

SERVE: Final = "serve"
ADMIN: Final = "admin"

HEALTH: Final = b"health\n"
LIVE: Final = b"live\n"
DRAIN: Final = b"drain\n"
DRAINING: Final = b"draining\n"
DRAINED: Final = b"drained\n"

_PREFIX: Final = "keyproxy/1/"
_NAME: Final = re.compile(
    r"keyproxy/1/(serve|admin)/([\w-]{24})/([\w-]{24})/([0-9a-f]{16})/[0-9]{1,10}-[0-9a-f]{8}", re.ASCII
)

#: First byte of a unix socket's place. As an IP address it would be a multicast group, which has no listener.
_UNIX: Final = b"\xff"
_NOWHERE: Final = "A" * 24
_CREDENTIALS: Final = struct.Struct("3i")
_ANSWER_SECONDS: Final = 2.0

#: What of a DSN's query says which database it is.
_LOCATING: Final = frozenset({"host", "hostaddr", "port", "dbname", "service"})


class Presence(NamedTuple):
    """What a process serves: its purpose, its listeners as `_encoded`, and a digest of where requests go and keys are."""

    purpose: str
    main: str
    ops: str
    serves: str

    def name(self) -> str:
        """A name for an abstract socket that no other process has."""
        unique = f"{os.getpid()}-{secrets.token_hex(4)}"
        return f"{_PREFIX}{self.purpose}/{self.main}/{self.ops}/{self.serves}/{unique}"

    def places(self) -> dict[str, Place]:
        """Where it listens, by the key that sets it."""
        named = {"listen.address": self.main, "ops.address": self.ops}
        if self.purpose == ADMIN:
            named = {"admin.address": self.main}
        return {key: _decoded(place) for key, place in named.items() if place != _NOWHERE}


class Running(NamedTuple):
    """A process that was found. `pid` 0: it is in another pid namespace, as a container beside this one."""

    presence: Presence
    name: str
    pid: int


def of_proxy(settings: Settings, dsn: str) -> Presence:
    """What `keyproxy serve` serves with these settings."""
    serves = [settings.upstream.url, settings.upstream.test_url, _database(dsn)]
    digest = hashlib.sha256(json.dumps(serves).encode()).hexdigest()[:16]
    return Presence(SERVE, _encoded(settings.listen.address), _encoded(settings.ops.address), digest)


def of_admin(settings: Settings) -> Presence:
    """What `keyproxy admin` serves with these settings."""
    return Presence(ADMIN, _encoded(settings.admin.address), _NOWHERE, "0" * 16)


def running() -> list[Running]:
    """The processes of this user on this machine. Root sees those of all users."""
    found = []
    # A connection to an abstract socket is listed by its name as well.
    for name in sorted(_names()):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        sock = connected(name)
        if sock is None:
            continue
        with sock:
            pid, _ = peer(sock)
        found.append(Running(Presence(match[1], match[2], match[3], match[4]), name, pid))
    return found


def connected(name: str) -> socket.socket | None:
    """A connection to a process; None if there is none of that name, or it is another user's."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_ANSWER_SECONDS)
        sock.connect(f"\0{name}")
        # Root asks the processes of all users.
        if os.geteuid() == 0 or is_trusted(sock):
            return sock
    except OSError:
        pass  # it has ended meanwhile, or does not accept: there is nothing to talk to
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


def of_configuration(settings: Settings, *purposes: str) -> list[Running]:
    """The running processes that have the addresses of this configuration."""
    mains = {SERVE: _encoded(settings.listen.address), ADMIN: _encoded(settings.admin.address)}
    wanted = {(purpose, mains[purpose]) for purpose in purposes}
    return [one for one in running() if (one.presence.purpose, one.presence.main) in wanted]


def is_live(one: Running) -> bool:
    """Whether the event loop of a process answers."""
    return ask(one.name, HEALTH) == LIVE


def ask(name: str, request: bytes) -> bytes:
    """The answer of a process to a request; empty if there is none in time."""
    sock = connected(name)
    if sock is None:
        return b""
    with sock:
        try:
            sock.sendall(request)
            return sock.recv(64)
        except OSError:
            return b""


def check_neighbours(mine: Presence, own_name: str) -> None:
    """Raises BindError if another process of ours has an address of this one, unless the two may share it.

    Two proxies share a port if both have the same upstream and database: a rolling restart. They share an ops listener
    only if they share the port too.
    """
    ours = mine.places()
    for other in running():
        if other.name == own_name:
            continue
        theirs = other.presence.places()
        shared = {key for key in ours.keys() & theirs.keys() if addresses.overlap(ours[key], theirs[key])}
        may_share = mine.serves == other.presence.serves and mine.purpose == SERVE and "listen.address" in shared
        for key, place in ours.items():
            for their_key, their_place in theirs.items():
                if addresses.overlap(place, their_place) and not (may_share and key == their_key):
                    raise sockets.BindError(_why(key, their_key, other))


def _why(key: str, their_key: str, other: Running) -> str:
    who = f"a running `keyproxy {other.presence.purpose}`" + (f" (pid {other.pid})" if other.pid else "")
    if key != their_key or other.presence.purpose == ADMIN:
        return f"{key}: {who} has this address as its {their_key}"
    if key == "ops.address":
        return f"{key}: {who} has this address, and proxies on another one: give each an ops.address of its own"
    return (
        f"{key}: {who} has this address, with another upstream or store: proxies that share a port have to agree."
        " Stop it first, or change its configuration and send it SIGHUP"
    )


def _names() -> set[str]:
    try:
        lines = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {line[at + 1 :] for line in lines if (at := line.find(f"@{_PREFIX}")) >= 0}


def _encoded(address: str) -> str:
    """An address of the configuration in 24 characters; names are resolved as for listening."""
    if address.startswith("unix:"):
        packed = _UNIX + hashlib.sha256(os.path.realpath(address[5:]).encode()).digest()[:17]
    else:
        host, _, port = address.rpartition(":")
        packed = _packed(host.strip("[]")) + struct.pack("!H", int(port))
    return base64.urlsafe_b64encode(packed).decode("ascii")


def _packed(host: str) -> bytes:
    try:
        where = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4]
    except OSError as error:
        raise sockets.BindError(f"cannot listen on {host}: {error.strerror or error}") from error
    address = addresses.plain(ipaddress.ip_address(where[0]))
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def _decoded(text: str) -> Place:
    packed = base64.urlsafe_b64decode(text)
    if packed.startswith(_UNIX):
        return Place(frozenset(), 0, packed.hex())
    return Place(
        frozenset({addresses.plain(ipaddress.IPv6Address(packed[:16]))}), int(struct.unpack("!H", packed[16:])[0])
    )


def _database(dsn: str) -> str:
    """Which database a DSN names, whoever connects to it: a password may be another one after a rotation."""
    parts = urlsplit(dsn)
    locating = sorted((name, value) for name, value in parse_qsl(parts.query) if name in _LOCATING)
    return json.dumps([parts.netloc.rpartition("@")[2].lower(), parts.path, locating])
