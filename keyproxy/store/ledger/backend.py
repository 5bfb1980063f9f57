"""The port of a ledger backend, as the ledger client uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport

#: Leases of dead holders that are charged in one statement.
REAP_PORTION: Final = 1_000


class LedgerBackend(Protocol):
    """Account for windows by the rules of limits/ledger/rules.py. tests/contracts.py compares every backend with them.

    All methods raise StoreUnavailable (or StoreConflict) if the outcome of the call is unknown.
    """

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        """Process one message of a holder, completely or not at all. None: this holder has ended."""
        ...

    async def reap(self, portion: int = REAP_PORTION) -> bool:
        """End expired holders: what they have not returned is charged, at most `portion` leases at a time.

        Return whether there may be more to do.
        """
        ...

    async def forget(self, portion: int) -> bool:
        """Delete up to `portion` holders that ended long ago. Return whether there may be more."""
        ...

    async def end(self, holder: str) -> None:
        """End this holder."""
        ...

    async def close(self) -> None:
        """Close connections."""
        ...
