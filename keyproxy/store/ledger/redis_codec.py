"""How messages travel to ledger.lua and what it answers: structs of fixed places, which both sides read fastest.

Amounts are doubles on the way there, as Lua has no other numbers: exact to 2**53, which no limit reaches.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Pool, Window
from keyproxy.store.ledger.postgres_backend import WindowState

#: Another one than before whenever ledger.lua keeps its values otherwise, or speaks otherwise: it is part of all keys, so
#: that proxies of two releases have a generation each.
VERSION: Final = 3

#: lease, starts, limit, interval_seconds, granted, used, returned, want, at_least, takes_all, is_closing, is_test; behind
#: it the pool's kind, the measure and the owner, each with a NUL at its end.
_LINE: Final = struct.Struct("<9d3B")
#: lease, starts, granted, spent, held, ends_seconds (-1: never), wait_seconds, is_wanted.
_REPLY: Final = struct.Struct("<5q2dB")


def packed_lines(lines: Sequence[LeaseReport]) -> bytes:
    """The lines of a message, one behind the other."""
    return b"".join([_packed(line) for line in lines])


def _packed(line: LeaseReport) -> bytes:
    (kind, owner, is_test), measure = line.window
    return _LINE.pack(line.lease, *line[2:], is_test) + f"{kind}\0{measure}\0{owner}\0".encode()


def replies(packed: bytes) -> list[LeaseGrant]:
    """What was answered, in the order of the lines."""
    return [
        LeaseGrant(
            lease, starts, granted, spent, held, math.inf if ends_seconds == -1 else ends_seconds, wait, bool(is_wanted)
        )
        for lease, starts, granted, spent, held, ends_seconds, wait, is_wanted in _REPLY.iter_unpack(packed)
    ]


def share_line(row: Sequence[Any]) -> LeaseReport:
    """What PostgreSQL is told of a share, and asked for: a row of the operation `stock`, without its first value."""
    number, kind, owner, is_test, measure, starts, limit, granted, used, returned, want, at_least, is_closing = row
    window = Window(Pool(kind, owner, is_test), measure)
    return LeaseReport(number, window, starts, limit, 0.0, granted, used, returned, want, at_least, False, is_closing)


def told(name: str, line: LeaseReport, reply: LeaseGrant) -> tuple[object, ...]:
    """A window's new share, and what of the window is others': a row of the operation `stocked`."""
    outstanding = 0 if line.is_closing else reply.granted - line.used - line.returned
    is_all = reply.granted - line.granted >= line.want
    return (name, reply.granted, reply.spent - line.used, reply.held - outstanding, is_all, line.is_closing)


def window_state(row: Sequence[Any] | None, in_database: WindowState | None) -> WindowState | None:
    """How a window stands: a row of the operation `stand`, or what PostgreSQL says where Redis does not know it."""
    if row is None:
        return in_database
    spent, held, forfeited, ends_seconds, ahead_seconds = row
    if in_database is not None:
        forfeited += in_database.forfeited
    return WindowState(spent, held, forfeited, math.inf if ends_seconds == -1 else ends_seconds, ahead_seconds)
