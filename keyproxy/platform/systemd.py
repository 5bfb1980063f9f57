"""State notifications to systemd (`Type=notify`): one datagram each, in the format of sd_notify(3)."""

from __future__ import annotations

import logging
import os
import socket
import time

_log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send a state, such as `READY=1`. A no-op without NOTIFY_SOCKET in the environment."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A leading @ stands for the abstract namespace.
    where = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode("ascii"), where)
    except OSError as error:
        _log.warning("cannot notify systemd of %s: %s", state.partition("=")[0], error)


def reloading() -> str:
    """The state that `Type=notify-reload` expects when a reload begins."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
