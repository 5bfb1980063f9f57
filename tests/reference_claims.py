"""The rules of claims in plain Python: what is charged, and the response to a batch.

The fake of ClaimStore for tests that need no server. tests/store/ledger/test_charge_dedup.py checks PostgreSQL against
the same rules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from keyproxy.store.ledger.charge_dedup import Answer, Claim, Cover
from keyproxy.store.postgres.database import StoreUnavailable

KEPT_SECONDS = 24 * 3600.0


@dataclass
class ReferenceClaims:
    """A ClaimStore in memory. Not `answers`: it is unavailable. `loses_answers`: how many responses to lose."""

    wall: Callable[[], float] = time.time
    answers: bool = True
    loses_answers: int = 0
    repeats_max: int = 1_000_000
    #: By fingerprint: the most tokens that any covered attempt used, when the first was charged, and the covered repeats.
    charges: dict[bytes, tuple[int, float, int]] = field(default_factory=dict)
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
            if self._is_beyond(claim):
                answers.append(Answer(True, claim.used))
                continue
            answers.append(self._judge(claim, here.get(claim.fingerprint, 0)))
            here[claim.fingerprint] = max(claim.used, here.get(claim.fingerprint, 0))
        self.batches[process] = (number, answers)
        return answers

    def _is_beyond(self, claim: Claim) -> bool:
        """Whether it is a repeat, and all covered repeats are used up."""
        is_repeat = claim.paid is None and self._charged(claim.fingerprint) is not None
        return is_repeat and self.charges[claim.fingerprint][2] >= self.repeats_max

    def _judge(self, claim: Claim, used_here: int) -> Answer:
        """`used_here`: the most that earlier claims in its batch used."""
        before = self._charged(claim.fingerprint)
        if before is not None:
            tokens, at, repeats = self.charges[claim.fingerprint]
            self.charges[claim.fingerprint] = (max(tokens, claim.used), at, repeats + (claim.paid is None))
        elif claim.paid is None:
            self.charges[claim.fingerprint] = (max(claim.used, used_here), self.wall(), 0)
            return Answer(True, claim.used)
        return Answer(False, max(0, claim.used - max(before or 0, claim.paid or 0, used_here)))

    def _charged(self, fingerprint: bytes) -> int | None:
        tokens, at, _ = self.charges.get(fingerprint, (0, 0.0, 0))
        return tokens if self.wall() - at < KEPT_SECONDS else None

    async def cover(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, Cover]:
        """See ClaimStore."""
        self._hear()
        return self.look(fingerprints)

    def look(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, Cover]:
        """Cover repeats, one fingerprint for each."""
        found: dict[bytes, Cover] = {}
        for one in fingerprints:
            if self._charged(one) is not None and self.charges[one][2] < self.repeats_max:
                tokens, at, repeats = self.charges[one]
                self.charges[one] = (tokens, at, repeats + 1)
                found[one] = Cover(tokens, found.get(one, Cover(0, 0)).repeats + 1)
        return found

    async def forget(self, portion: int) -> bool:
        """See ClaimStore."""
        del portion
        self._hear()
        self.charges = {one: charge for one, charge in self.charges.items() if self._charged(one) is not None}
        return False

    def _hear(self) -> None:
        if not self.answers:
            raise StoreUnavailable("down")
