"""One log line when a server stops responding and one when it is back, however many parts of the store use it.

The change feed, the ledger, usage and lookups each notice an outage separately, within moments of each other and again
with every retry. The first one logs it. It is over once the server has responded for a while without another failure, so
that a server that responds intermittently has one outage and not hundreds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from keyproxy.platform import clock

_log = logging.getLogger(__name__)

#: How long there must be no failure before an outage counts as over.
_QUIET_SECONDS: Final = 3.0

#: The main part notices an outage within this time. If it does so later, earlier errors of other parts had another cause.
_SAME_SECONDS: Final = 5.0


class Outage:
    """The outage state of a server, shared by all parts of the store that use it: see the module."""

    def __init__(self, what: str, now_mono: Callable[[], float] | None = None) -> None:
        """`what` names the server in the log."""
        self.is_on = False
        self._what = what
        self._now_mono: Callable[[], float] = now_mono or clock.monotonic
        self._began_mono = self._last_failure_mono = 0.0
        self._is_main_logged = False

    def met(self, sentence: str, *, is_main: bool = False) -> None:
        """A part got no response. `is_main`: it polls continuously, and calls `responded` when it gets one."""
        now = self._now_mono()
        self._last_failure_mono = now
        is_another = is_main and not self._is_main_logged and now - self._began_mono > _SAME_SECONDS
        if self.is_on and not is_another:
            _log.debug("%s", sentence)
        else:
            _log.warning("%s", sentence)
            if not self.is_on:
                self._began_mono = now
            self.is_on = True
        self._is_main_logged = self._is_main_logged or is_main

    def responded(self) -> None:
        """The main part got a response. Cheap to call while there is no outage."""
        now = self._now_mono()
        if not self.is_on or now - self._last_failure_mono < _QUIET_SECONDS:
            return
        _log.warning("%s is available again after %d s", self._what, self._last_failure_mono - self._began_mono)
        self.is_on = self._is_main_logged = False
