"""The record of charges in PostgreSQL: a batch of claims is one transaction. See migrations/0009_claims.sql."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keyproxy.store.ledger.charge_dedup import Answer, Claim
from keyproxy.store.postgres.database import Database


class PostgresClaims:
    """Record charges in PostgreSQL. Implements ClaimStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, process: str, number: int, claims: Sequence[Claim]) -> Sequence[Answer] | None:
        """See ClaimStore."""
        rows = await self._database.fetch(
            "claim_charges",
            process,
            number,
            [claim.fingerprint for claim in claims],
            [claim.used for claim in claims],
            [claim.paid for claim in claims],
        )
        return [Answer(*pair) for pair in zip(*rows[0], strict=True)] if rows else None

    async def charged(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, int]:
        """See ClaimStore."""
        rows = await self._database.fetch("charges_of", fingerprints)
        return {row["fingerprint"]: row["tokens"] for row in rows}

    async def forget(self, portion: int) -> bool:
        """See ClaimStore."""
        charges = await self._database.fetch("forget_charges", portion)
        batches = await self._database.fetch("forget_claim_batches", portion)
        return max(len(charges), len(batches)) >= portion
