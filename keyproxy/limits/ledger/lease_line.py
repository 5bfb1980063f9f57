"""The line to send to the ledger about a lease: its changes, and how much to request."""

from __future__ import annotations

import math
from typing import Final

from keyproxy.limits.lease import LASTS_SECONDS, Lease
from keyproxy.limits.ledger.report_pace import longer_slice
from keyproxy.limits.ledger_protocol import LeaseReport

#: The most of a rate that is prefetched, as refill time: unused units are lost.
_RATE_LASTS_SECONDS: Final = 0.4

#: The shortest interval over which the pace is measured. A shorter burst does not predict future use.
_PACE_SECONDS_MIN: Final = 0.05

#: The first prefetch, beyond the immediate need, while the pace is unknown. After that the prefetch at most doubles
#: from one message to the next.
_FIRST_UNITS: Final = 4


def line_of(lease: Lease, now_mono: float, *, is_closing: bool = False) -> LeaseReport:
    """Build the line to send to the ledger: changes, and a request for more. Pass the reply to `apply`."""
    want, at_least = _wanted(lease, now_mono) if lease.is_current and not is_closing else (0, 0)
    most = max(at_least, min(lease.need - max(lease.free, 0), want)) if lease.need else 0
    returned, granted_at = lease.rate.taken() if lease.is_rate else (lease.returned, 0.0)
    line = LeaseReport(
        lease.number, lease.window, lease.starts, lease.limit, lease.interval_seconds, lease.granted, lease.used,
        returned, want, at_least, most, is_closing, granted_at,
    )  # fmt: skip
    if lease.is_asked and lease.pause_seconds:
        lease.touched_mono = now_mono
    lease.report_after(now_mono, max(lease.pause_seconds, lease.report_seconds))
    lease.need = lease.at_least = 0
    lease.is_asked = False
    lease.sent = lease.used + lease.returned
    return line


def _wanted(lease: Lease, now_mono: float) -> tuple[int, int]:
    """Return how much to request, and the least that is useful."""
    elapsed = now_mono - lease.paced_mono
    if elapsed >= _PACE_SECONDS_MIN:
        taken = lease.taken
        # The pace rises immediately and halves within a second: a gap between requests does not mean that they ended.
        lease.pace = max((taken - lease.taken_before) / elapsed, lease.pace * 0.5**elapsed)
        lease.taken_before, lease.paced_mono = taken, now_mono
    is_quiet = now_mono < lease.is_wanted_until or not (lease.need or lease.is_busy(now_mono))
    lease.ahead = 0 if is_quiet else _wanted_ahead(lease)
    lease.low = lease.ahead // 2
    if lease.need and not lease.is_rate and lease.at_least > lease.quota - lease.spent:
        # Not even the smallest waiting request fits. The ledger writes an alert for a refusal, which it recognizes
        # only if it is asked for the whole amount.
        lease.give_back()
    want = max(max(lease.ahead, lease.need) - lease.free, 0)
    # A waiting request needs this amount in one piece; the free units count towards it.
    short = max(1, lease.at_least - max(lease.free, 0)) if lease.need else 1
    return want, min(short, want)


def _wanted_ahead(lease: Lease) -> int:
    """Return the amount that lasts for a while at the current pace, and at least what two requests take."""
    if lease.is_rate:
        lasts = min(lease.pace, 1.0 / lease.interval_seconds) * _RATE_LASTS_SECONDS
        return math.ceil(lasts) if lease.interval_seconds < _RATE_LASTS_SECONDS else 0
    first = max(_FIRST_UNITS, 2 * lease.piece)
    if not lease.granted and not lease.period_seconds:
        return lease.need + first if lease.need else 0
    growth = 2 + math.ceil(max(2.0 * lease.pause_seconds, lease.report_seconds / 2.0))
    ahead = math.ceil(lease.pace * max(LASTS_SECONDS, 2.0 * lease.pause_seconds))
    ahead = max(ahead, longer_slice(lease.pace, lease.report_seconds, lease.seen_available))
    ahead = min(ahead, growth * lease.ahead + first) if lease.granted else max(ahead, lease.piece)
    return max(ahead, 2 * lease.piece) if lease.pace > 0.0 and lease.piece > 1 else ahead
