"""The rules of the ledger with a clock: every backend is compared with them, and tests without a server use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from keyproxy.limits.ledger.accounts import Holder, Replica, WindowAccount, WindowStart
from keyproxy.limits.ledger.rules import LedgerRules
from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Pool, Window

#: A line about a rate of its own, which requests nothing. Its reply has the time at which a message was processed.
_CLOCK: Final = LeaseReport(999_999, Window(Pool("user", "clock", False), "rate"), 0, 1, 1.0, 0, 0, 0, 0, 0, 0, False)


def timed(*lines: LeaseReport) -> list[LeaseReport]:
    """The lines of a message whose replies have the time at which a backend processed it: see `ReferenceLedger.follow`.

    A message without lines stays as it is: nothing in its reply depends on the time.
    """
    return [*lines, _CLOCK] if lines else []


class ReferenceLedger:
    """LedgerRules at the time of a clock."""

    def __init__(self, clock: Callable[[], float], *, lease_seconds: float) -> None:
        """`clock` gives Unix time."""
        self.clock = clock
        self.rules = LedgerRules(lease_seconds=lease_seconds)

    @property
    def windows(self) -> dict[WindowStart, WindowAccount]:
        """The account of every window."""
        return self.rules.windows

    @property
    def holders(self) -> dict[str, Holder]:
        """Every holder that is not deleted."""
        return self.rules.holders

    def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> list[LeaseGrant] | None:
        """Process one message. None: this holder has ended. Raises LateMessageError."""
        return self.rules.sync(holder, serial, lines, self.clock())

    def follow(
        self, holder: str, serial: int, lines: Sequence[LeaseReport], replies: Sequence[LeaseGrant]
    ) -> list[LeaseGrant] | None:
        """Process a message of `timed` lines at the instant at which a backend did, as its replies have it.

        At another instant a rate has refilled more or less of a unit, and a shortage may have been forgotten.
        """
        instants = [reply.granted_at for reply in replies if reply.lease == _CLOCK.lease]
        return self.rules.sync(holder, serial, lines, instants[0] if instants else self.clock())

    def recalled(self, holder: str) -> list[int]:
        """The leases whose idle units a holder shall return."""
        return self.rules.recalled(holder)

    def reap(self) -> None:
        """End expired holders."""
        self.rules.reap(self.clock())

    def forget(self, after_seconds: float) -> None:
        """Delete holders that rest or have ended."""
        self.rules.forget(after_seconds, self.clock())

    def end(self, name: str) -> None:
        """End a holder."""
        self.rules.end(name)

    def fail_over(self, replica: Replica) -> None:
        """Fail over to a replica that lags behind."""
        self.rules.fail_over(replica, self.clock())
