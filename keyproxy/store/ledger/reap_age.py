"""How long ago this process last finished ending dead holders: until that is done, their units stay reserved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from keyproxy.model import Moment

_log = logging.getLogger(__name__)

#: Without a finished run for this many lease times, holders of other processes may have been dead for that long too.
_LATE_LEASES: Final = 3.0


class ReapAge:
    """The age of the last finished run, and a warning once it is late."""

    def __init__(self, lease_seconds: float, now: Callable[[], Moment]) -> None:
        self._late_seconds = _LATE_LEASES * lease_seconds
        self._now = now
        self._finished_mono = now().mono_seconds
        self._is_logged = False

    def __repr__(self) -> str:
        return f"<ReapAge {self.seconds():.1f} of {self._late_seconds:g} s>"

    def seconds(self) -> float:
        """Seconds since the last finished run, or since the start."""
        return max(0.0, self._now().mono_seconds - self._finished_mono)

    @property
    def is_late(self) -> bool:
        """Whether no run has finished for too long."""
        return self.seconds() >= self._late_seconds

    def warn_if_late(self) -> None:
        """Log once that no run has finished for too long. Before each run, which may fail in any way."""
        if self.is_late and not self._is_logged:
            self._is_logged = True
            _log.warning("dead holders of leases were not ended for %.0f s: their units stay reserved", self.seconds())

    def finished(self) -> None:
        """A run has ended every dead holder."""
        if self._is_logged:
            _log.warning("dead holders of leases are ended again, after %.0f s", self.seconds())
        self._finished_mono, self._is_logged = self._now().mono_seconds, False
