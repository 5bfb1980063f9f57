"""Credentials that are not cached: which of them cannot be accepted, and how to find out about the others.

An agent token is verified without a query before its row is looked up. A key of a foreign form is first imported by its
own hash. A digest without a row, or of a token that is not genuine or has expired, is kept for unknown_seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

import cachetools

from keyproxy.auth.agent_token_format import is_jwt
from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import Cache
from keyproxy.model import KeyDigest, Missing, Moment, TimeBudget
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.identities import drf_api_keys
from keyproxy.store.identities.drf_api_keys import DrfApiKeys
from keyproxy.store.postgres.database import Database

#: Why a digest is refused, and the detail for the log.
_Verdict: TypeAlias = tuple[Reason, str]

_NO_ROW: Final[_Verdict] = (Reason.KEY_INVALID, "the store has no such key")


class TokenVerifier(Protocol):
    """Verifies the signature and the claims of an agent token, without the rows of tokens."""

    def verify(self, token: bytes, now: Moment) -> None:
        """Raises a Refusal for a token that is not genuine or has expired, Missing for an unknown signing key."""
        ...


class UnknownCredentials:
    """Credentials that are not cached: see the module."""

    def __init__(
        self, database: Database, cache: Cache, verifier: TokenVerifier | None, now: Callable[[], Moment]
    ) -> None:
        """Without a `verifier`, no agent token is accepted."""
        self._verifier = verifier
        self._now = now
        self._foreign = DrfApiKeys(database)
        self._verdicts: cachetools.TTLCache[KeyDigest, _Verdict] = cachetools.TTLCache(
            cache.unknown_entries_max, cache.unknown_seconds, timer=lambda: now().mono_seconds
        )

    def __len__(self) -> int:
        """How many digests are known to be refused."""
        return len(self._verdicts)

    def __contains__(self, digest: object) -> bool:
        """Whether the digest is known to be refused."""
        return digest in self._verdicts

    def refusal(self, digest: KeyDigest) -> Refusal | None:
        """The refusal of a digest; None if it has to be looked up."""
        verdict = self._verdicts.get(digest)
        return None if verdict is None else Refusal(*verdict)

    def add(self, digest: KeyDigest) -> None:
        """The store has no row with this digest."""
        self._verdicts[digest] = _NO_ROW

    def discard(self, digest: KeyDigest) -> None:
        """The digest was created, or may have been."""
        self._verdicts.pop(digest, None)

    def clear(self) -> None:
        """Any digest may have been created."""
        self._verdicts.clear()

    def fetching(self, key: SecretKey, missing: Missing, token: Missing, *, is_cached: bool) -> Missing:
        """What to fetch for this credential, after `known` or `acting` raised `missing`. Raises a Refusal.

        `token`: the lookup of the credential as an agent token. `is_cached`: there are outdated entries of it. A token is
        verified again nevertheless: the configuration may accept other tokens than before.
        """
        if is_jwt(key.reveal()):
            try:
                self._verify(key)
            except Missing as unknown_signing_key:
                return unknown_signing_key
            return token
        if is_cached or drf_api_keys.prefix_of(key) is None:
            return missing

        async def fetch_missing(patience: TimeBudget) -> None:
            await self._foreign.adopt(key)
            await missing.fetch_missing(patience)

        return Missing("identity", fetch_missing)

    def _verify(self, key: SecretKey) -> None:
        try:
            if self._verifier is None:
                raise Refusal(Reason.KEY_INVALID, "no signing keys: agent tokens are not accepted")
            self._verifier.verify(key.reveal(), self._now())
        except Refusal as refusal:
            if refusal.reason in (Reason.KEY_INVALID, Reason.KEY_EXPIRED):
                self._verdicts[key.digest()] = (refusal.reason, refusal.detail)
            raise
