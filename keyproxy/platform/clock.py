"""The clocks: the only place that reads the time for a decision."""

from __future__ import annotations

import time

from keyproxy.model import Moment


def now() -> Moment:
    """This instant on both clocks."""
    return Moment(time.time(), time.monotonic())


def wall_offset() -> float:
    """What to add to a monotonic time to get Unix time."""
    return time.time() - time.monotonic()


monotonic = time.monotonic
wall = time.time
