"""The record of charges in PostgreSQL: a batch of claims is one transaction. See migrations/0016_usage_of_models.sql."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from keyproxy.store.ledger.charge_dedup import Answer, Claim, Cover
from keyproxy.store.postgres.database import Database

#: Repeats that one charge covers in 24 hours, unless configured otherwise.
REPEATS_MAX: Final = 3


class PostgresClaims:
    """Record charges in PostgreSQL. Implements ClaimStore."""

    def __init__(self, database: Database, *, repeats_max: int = REPEATS_MAX) -> None:
        self._database = database
        self._repeats_max = repeats_max

    async def claim(self, process: str, number: int, claims: Sequence[Claim]) -> Sequence[Answer] | None:
        rows = await self._database.fetch(
            "claim_charges",
            process,
            number,
            [claim.fingerprint for claim in claims],
            [claim.used for claim in claims],
            [claim.paid for claim in claims],
            self._repeats_max,
        )
        return [Answer(*pair) for pair in zip(*rows[0], strict=True)] if rows else None

    async def cover(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, Cover]:
        rows = await self._database.fetch("cover_repeats", fingerprints, self._repeats_max)
        return {row["fingerprint"]: Cover(row["tokens"], row["covered"]) for row in rows}

    async def forget(self, portion: int) -> bool:
        charges = await self._database.fetch("forget_charges", portion)
        batches = await self._database.fetch("forget_claim_batches", portion)
        return max(int(charges[0]["gone"]), len(batches)) >= portion
