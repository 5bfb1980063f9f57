"""What the ledger's conversation needs of where windows are accounted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport

#: Leases of dead holders that are charged in one statement.
REAP_PORTION: Final = 1_000


class LedgerBackend(Protocol):
    """Where windows are accounted. Contract: tests/reference_ledger.py says the rules, tests/contracts.py holds to them.

    All methods raise StoreUnavailable (or StoreConflict) if nobody knows what became of the call.
    """

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        """One message of a holder. All of it counts or nothing. None: this holder has ended."""
        ...

    async def reap(self, portion: int = REAP_PORTION) -> bool:
        """End holders whose time is over: what they have not returned is charged, at most `portion` leases at a time.

        Whether there may be more to do.
        """
        ...

    async def forget(self, portion: int) -> bool:
        """Delete holders that ended long ago, at most `portion`. Whether there may be more."""
        ...

    async def end(self, holder: str) -> None:
        """End this holder."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...
