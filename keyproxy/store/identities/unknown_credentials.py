"""Credentials that are not cached: which of them cannot be accepted, and how to find out about the others.

An agent token is verified without a query before its row is looked up. A key of a foreign form is first imported by its
own hash. The digest of a token that is not genuine or has expired is kept for unknown_seconds, as one without a row is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from keyproxy.auth.agent_token_format import is_jwt
from keyproxy.auth.api_key import SecretKey, is_access_token
from keyproxy.model import KeyDigest, Missing, Moment, TimeBudget
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.identities import drf_api_keys
from keyproxy.store.identities.delegated_rows import TokenDigest
from keyproxy.store.identities.drf_api_keys import DrfApiKeys
from keyproxy.store.identities.identity_rows import AccessTokenDigest
from keyproxy.store.identities.refused_digests import RefusedDigests
from keyproxy.store.identities.request_lookup import LookupOwner
from keyproxy.store.postgres.database import Database


class TokenVerifier(Protocol):
    """Verifies the signature and the claims of an agent token, without the rows of tokens."""

    def verify(self, token: bytes, now: Moment) -> None:
        """Raises a Refusal for a token that is not genuine or has expired, Missing for an unknown signing key."""
        ...


class UnknownCredentials:
    """Credentials that are not cached: see the module."""

    def __init__(
        self, database: Database, refused: RefusedDigests, verifier: TokenVerifier | None, now: Callable[[], Moment]
    ) -> None:
        """`refused`: keeps the digests of tokens that are not accepted. Without a `verifier`, no agent token is."""
        self._verifier = verifier
        self._now = now
        self._foreign = DrfApiKeys(database)
        self._refused = refused

    def fetching(
        self, key: SecretKey, missing: Missing, fetches: LookupOwner, *, is_cached: Callable[[KeyDigest], bool]
    ) -> Missing:
        """What to fetch for this credential, after `known` or `acting` raised `missing`. Raises a Refusal.

        `fetches`: looks up what `missing` does not. `is_cached`: whether there are outdated entries of a digest. A token
        is verified again nevertheless: the configuration may accept other tokens than before.
        """
        plaintext = key.reveal()
        if is_access_token(plaintext):
            return fetches.missing(AccessTokenDigest(key.digest()))
        if plaintext.find(b".") < 0:
            # Neither an agent token nor a key that another program has issued.
            return missing
        if is_jwt(plaintext):
            try:
                self._verify(key)
            except Missing as unknown_signing_key:
                return unknown_signing_key
            return fetches.missing(TokenDigest(key.digest()))
        if drf_api_keys.prefix_of(key) is None or is_cached(key.digest()):
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
                mono = self._now().mono_seconds
                self._refused.add(key.digest(), mono, reason=refusal.reason, detail=refusal.detail)
            raise
