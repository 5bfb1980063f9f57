"""The encoding of messages to ledger.lua and of its replies: structs with a fixed layout, the fastest for both sides.

Amounts are sent as doubles, since Lua has no other numbers: exact up to 2**53, which no limit reaches.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Pool, Window
from keyproxy.store.ledger.postgres_backend import WindowState

#: Incremented whenever ledger.lua changes its stored values or its messages. It is part of all keys, so that proxies of
#: two releases use separate generations.
VERSION: Final = 3

#: lease, starts, limit, interval_seconds, granted, used, returned, want, at_least, takes_all, is_closing, is_test; then
#: the pool's kind, the measure and the owner, each terminated by a NUL.
_LINE: Final = struct.Struct("<9d3B")
#: lease, starts, granted, spent, held, ends_seconds (-1: never), wait_seconds, is_wanted.
_REPLY: Final = struct.Struct("<5q2dB")


def packed_lines(lines: Sequence[LeaseReport]) -> bytes:
    """The lines of a message, concatenated."""
    return b"".join([_packed(line) for line in lines])


def _packed(line: LeaseReport) -> bytes:
    (kind, owner, is_test), measure, _ = line.window
    return (
        _LINE.pack(line.lease, *line[2:10], False, line.is_closing, is_test) + f"{kind}\0{measure}\0{owner}\0".encode()
    )


def replies(packed: bytes) -> list[LeaseGrant]:
    """Decode the replies, in the order of the lines."""
    return [
        LeaseGrant(
            lease, starts, granted, spent, held, math.inf if ends_seconds == -1 else ends_seconds, wait, bool(is_wanted)
        )
        for lease, starts, granted, spent, held, ends_seconds, wait, is_wanted in _REPLY.iter_unpack(packed)
    ]


def share_line(row: Sequence[Any]) -> LeaseReport:
    """The report of a share to PostgreSQL, from a row of the operation `stock` without its first value."""
    number, kind, owner, is_test, measure, starts, limit, granted, used, returned, want, at_least, is_closing = row
    window = Window(Pool(kind, owner, is_test), measure)
    return LeaseReport(number, window, starts, limit, 0.0, granted, used, returned, want, at_least, 0, is_closing)


def told(name: str, line: LeaseReport, reply: LeaseGrant) -> tuple[object, ...]:
    """A window's new share, and what other holders have of the window: a row of the operation `stocked`."""
    outstanding = 0 if line.is_closing else reply.granted - line.used - line.returned
    is_all = reply.granted - line.granted >= line.want
    return (name, reply.granted, reply.spent - line.used, reply.held - outstanding, is_all, line.is_closing)


def window_state(row: Sequence[Any] | None, in_database: WindowState | None) -> WindowState | None:
    """The state of a window: from a row of `stand`, or from PostgreSQL if Redis does not have the window."""
    if row is None:
        return in_database
    spent, held, forfeited, ends_seconds, ahead_seconds = row
    if in_database is not None:
        forfeited += in_database.forfeited
    return WindowState(spent, held, forfeited, math.inf if ends_seconds == -1 else ends_seconds, ahead_seconds)
