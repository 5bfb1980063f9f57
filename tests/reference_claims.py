"""The rules of claims in plain Python: what is charged, and the response to a batch.

The fake of ClaimStore for tests that need no server. tests/store/ledger/test_charge_dedup.py checks PostgreSQL against
the same rules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from keyproxy.store.ledger.charge_dedup import Answer, Claim
from keyproxy.store.postgres.database import StoreUnavailable

KEPT_SECONDS = 24 * 3600.0


@dataclass
class ReferenceClaims:
    """A ClaimStore in memory. Not `answers`: it is unavailable. `loses_answers`: how many responses to lose."""

    wall: Callable[[], float] = time.time
    answers: bool = True
    loses_answers: int = 0
    #: By fingerprint: the most tokens that any attempt used, and when the first was charged.
    charges: dict[bytes, tuple[int, float]] = field(default_factory=dict)
    batches: dict[str, tuple[int, list[Answer]]] = field(default_factory=dict)

    async def claim(self, process: str, number: int, claims: Sequence[Claim]) -> Sequence[Answer] | None:
        """See ClaimStore."""
        self._hear()
        answers = self.hear(process, number, claims)
        if self.loses_answers:
            self.loses_answers -= 1
            raise StoreUnavailable("the response was lost")
        return answers

    def hear(self, process: str, number: int, claims: Sequence[Claim]) -> Sequence[Answer] | None:
        """Process a batch."""
        last, answers = self.batches.get(process, (0, []))
        if number <= last:
            return answers if number == last else None
        here: dict[bytes, int] = {}
        answers = []
        for claim in claims:
            answers.append(self._judge(claim, here.get(claim.fingerprint, 0)))
            here[claim.fingerprint] = max(claim.used, here.get(claim.fingerprint, 0))
        self.batches[process] = (number, answers)
        return answers

    def _judge(self, claim: Claim, used_here: int) -> Answer:
        """`used_here`: the most that earlier claims in its batch used."""
        before = self._charged(claim.fingerprint)
        if before is not None:
            tokens, at = self.charges[claim.fingerprint]
            self.charges[claim.fingerprint] = (max(tokens, claim.used), at)
        elif claim.paid is None:
            self.charges[claim.fingerprint] = (max(claim.used, used_here), self.wall())
            return Answer(True, claim.used)
        return Answer(False, max(0, claim.used - max(before or 0, claim.paid or 0, used_here)))

    def _charged(self, fingerprint: bytes) -> int | None:
        tokens, at = self.charges.get(fingerprint, (0, 0.0))
        return tokens if self.wall() - at < KEPT_SECONDS else None

    async def charged(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, int]:
        """See ClaimStore."""
        self._hear()
        return self.look(fingerprints)

    def look(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, int]:
        """The fingerprints that were charged in the last 24 hours, with their tokens."""
        return {one: tokens for one in fingerprints if (tokens := self._charged(one)) is not None}

    async def forget(self, portion: int) -> bool:
        """See ClaimStore."""
        del portion
        self._hear()
        self.charges = {one: charge for one, charge in self.charges.items() if self._charged(one) is not None}
        return False

    def _hear(self) -> None:
        if not self.answers:
            raise StoreUnavailable("down")
