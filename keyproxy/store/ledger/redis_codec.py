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
VERSION: Final = 6

#: lease, starts, limit, interval_seconds, granted, used, returned, want, at_least, most, granted_at, is_closing, is_test;
#: then the pool's kind, the measure, the owner and the selector, each terminated by a NUL.
_LINE: Final = struct.Struct("<11d2B")
#: lease, starts, granted, spent, held, credited, holders, ends_seconds (-1: never), wait_seconds, granted_at, is_wanted.
_REPLY: Final = struct.Struct("<7q3dB")


def packed_lines(lines: Sequence[LeaseReport]) -> bytes:
    """The lines of a message, concatenated."""
    return b"".join([_packed(line) for line in lines])


def _packed(line: LeaseReport) -> bytes:
    (kind, owner, is_test), measure, selector = line.window
    return (
        _LINE.pack(line.lease, *line[2:11], line.granted_at, line.is_closing, is_test)
        + f"{kind}\0{measure}\0{owner}\0{selector}\0".encode()
    )


def replies(packed: bytes) -> list[LeaseGrant]:
    """Decode the replies, in the order of the lines."""
    return [
        LeaseGrant(
            lease, starts, granted, spent, held, math.inf if ends_seconds == -1 else ends_seconds, wait, bool(is_wanted),
            credited, holders, granted_at,
        )
        for lease, starts, granted, spent, held, credited, holders, ends_seconds, wait, granted_at, is_wanted
        in _REPLY.iter_unpack(packed)
    ]  # fmt: skip


def named(window: Window) -> tuple[object, ...]:
    """A window, as the operations `stand` and `refresh` take it."""
    return (*window.pool, window.measure, window.selector)


def share_line(row: Sequence[Any]) -> LeaseReport:
    """The report of a share to PostgreSQL, from a row of the operation `stock` without its first value."""
    number, kind, owner, is_test, measure, selector, starts, limit, *figures, is_closing = row
    window = Window(Pool(kind, owner, is_test), measure, selector)
    granted, used, returned, want, at_least, most = figures
    return LeaseReport(number, window, starts, limit, 0.0, granted, used, returned, want, at_least, most, is_closing)


def stocked(name: str, line: LeaseReport, reply: LeaseGrant, alert_percentages: Sequence[int]) -> tuple[object, ...]:
    """A window's new share, and PostgreSQL's account of the window: a row of the operation `stocked`."""
    outstanding = 0 if line.is_closing else reply.granted - line.used - line.returned
    is_all = reply.granted - line.granted >= line.want
    others_spent = reply.spent - line.used
    # Where this generation's part of what is spent reaches the next percentage.
    amounts = [max(1, -(-percentage * (line.limit + reply.credited) // 100)) for percentage in alert_percentages]
    alert_at = min([amount for amount in amounts if amount > reply.spent], default=others_spent) - others_spent
    return (
        name, reply.granted, others_spent, reply.held - outstanding, is_all, line.is_closing, reply.credited, alert_at,
        line.lease, line.used,
    )  # fmt: skip


def window_state(row: Sequence[Any] | None, in_database: WindowState | None) -> WindowState | None:
    """The state of a window: from a row of `stand`, or from PostgreSQL if Redis does not have the window.

    What was credited is PostgreSQL's, which the proxies need not have received yet.
    """
    if row is None:
        return in_database
    spent, held, forfeited, ends_seconds, ahead_seconds = row
    credited = 0
    if in_database is not None:
        forfeited += in_database.forfeited
        credited = in_database.credited
    ends_seconds = math.inf if ends_seconds == -1 else ends_seconds
    return WindowState(spent, held, forfeited, ends_seconds, ahead_seconds, credited)
