"""TCP keepalives by libpq's parameters, so that the kernel detects a dead server."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any, Final

#: TCP keepalive parameters by libpq's names: idle seconds, seconds between probes, lost probes until a peer is dead.
_KEEPALIVES: Final = (
    ("keepalives_idle", getattr(socket, "TCP_KEEPIDLE", None)),
    ("keepalives_interval", getattr(socket, "TCP_KEEPINTVL", None)),
    ("keepalives_count", getattr(socket, "TCP_KEEPCNT", None)),
    ("tcp_user_timeout", getattr(socket, "TCP_USER_TIMEOUT", None)),
)


def enable(transport: Any, parameters: Mapping[str, str]) -> None:
    """Enable keepalives according to the parameters of a DSN, so that the kernel detects a dead peer, as libpq does."""
    sock = transport.get_extra_info("socket")
    if sock is None or parameters.get("keepalives", "1") == "0":
        return
    own = socket.socket(fileno=os.dup(sock.fileno()))
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, option in _KEEPALIVES:
            value = int(parameters.get(name, "0"))
            if value > 0 and option is not None:
                own.setsockopt(socket.IPPROTO_TCP, option, value)
    finally:
        own.close()
