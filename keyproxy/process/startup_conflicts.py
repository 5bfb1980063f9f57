"""The presence that a process publishes, and the running processes that it conflicts with.

Workers share a port on purpose, and so do the two proxies of a rolling restart. Any other overlap is refused here,
before a socket is bound.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import os
import struct
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from keyproxy.config import addresses
from keyproxy.config.addresses import NetworkAddress
from keyproxy.config.schema import Settings
from keyproxy.platform import process_registry, sockets
from keyproxy.platform.process_registry import ADMIN, AUTHORIZE, NOWHERE, SERVE, UNIX, Presence, Running

#: The parameters of a DSN's query that identify the database.
_LOCATING: Final = frozenset({"host", "hostaddr", "port", "dbname", "service"})


def of_proxy(settings: Settings, dsn: str) -> Presence:
    """The presence of `keyproxy serve` with these settings. Raises BindError."""
    serves = [settings.upstream.url, settings.upstream.test_url, _database(dsn)]
    digest = hashlib.sha256(json.dumps(serves).encode()).hexdigest()[:16]
    return Presence(SERVE, _encoded(settings.listen.address), _encoded(settings.ops.address), digest)


def of_admin(settings: Settings) -> Presence:
    """The presence of `keyproxy admin` with these settings. Raises BindError."""
    return Presence(ADMIN, _encoded(settings.admin.address), NOWHERE, "0" * 16)


def of_authorize(settings: Settings) -> Presence:
    """The presence of `keyproxy authorize` with these settings. Raises BindError."""
    return Presence(AUTHORIZE, _encoded(settings.oauth.address), _encoded(settings.oauth.ops_address), "0" * 16)


def addresses_of(presence: Presence) -> dict[str, NetworkAddress]:
    """The addresses of a process, by configuration key."""
    named = {"listen.address": presence.main, "ops.address": presence.ops}
    if presence.purpose == ADMIN:
        named = {"admin.address": presence.main}
    elif presence.purpose == AUTHORIZE:
        named = {"oauth.address": presence.main, "oauth.ops_address": presence.ops}
    return {key: _decoded(place) for key, place in named.items()}


def check(mine: Presence, own_name: str) -> None:
    """Raises BindError if another process of this user has an address of this one, unless the two may share it.

    Two proxies share a port if both have the same upstream and database: a rolling restart. They share an ops listener
    only if they share the port too.
    """
    ours = addresses_of(mine)
    for other in process_registry.running():
        # Another user's process cannot share a port, whatever its name claims.
        if other.name == own_name or other.uid != os.geteuid():
            continue
        theirs = addresses_of(other.presence)
        shared = {key for key in ours.keys() & theirs.keys() if addresses.overlap(ours[key], theirs[key])}
        may_share = mine.serves == other.presence.serves and mine.purpose == SERVE and "listen.address" in shared
        for key, place in ours.items():
            for their_key, their_place in theirs.items():
                if addresses.overlap(place, their_place) and not (may_share and key == their_key):
                    raise sockets.BindError(_why(key, their_key, other))


def _why(key: str, their_key: str, other: Running) -> str:
    owner = f"a running `keyproxy {other.presence.purpose}`" + (f" (pid {other.pid})" if other.pid else "")
    if key != their_key or other.presence.purpose in (ADMIN, AUTHORIZE):
        return f"{key}: {owner} has this address as its {their_key}"
    if key == "ops.address":
        return f"{key}: {owner} has this address but another listen.address: give each proxy its own ops.address"
    return (
        f"{key}: {owner} has this address, with another upstream or store: proxies on one port must have the same."
        " Stop it first, or change its configuration and send it SIGHUP"
    )


def _encoded(address: str) -> str:
    try:
        return process_registry.encoded(address)
    except OSError as error:
        raise sockets.BindError(f"cannot listen on {address}: {error.strerror or error}") from error


def _decoded(text: str) -> NetworkAddress:
    packed = base64.urlsafe_b64decode(text)
    if packed.startswith(UNIX):
        return NetworkAddress(frozenset(), 0, packed.hex())
    return NetworkAddress(
        frozenset({addresses.plain(ipaddress.IPv6Address(packed[:16]))}), int(struct.unpack("!H", packed[16:])[0])
    )


def _database(dsn: str) -> str:
    """The database that a DSN names, without its credentials: the password may change in a rotation."""
    parts = urlsplit(dsn)
    locating = sorted((name, value) for name, value in parse_qsl(parts.query) if name in _LOCATING)
    return json.dumps([parts.netloc.rpartition("@")[2].lower(), parts.path, locating])
