"""Mints on behalf of operators, by the admin process and by commands: their own signing key, and what a mint needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from keyproxy.auth.minting import MintRules
from keyproxy.config.delegation_settings import AccessSettings
from keyproxy.model import Moment
from keyproxy.ports import AgentTokenMint
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.signing_key import SigningKey
from keyproxy.store.agent_tokens.minter import TokenMinter
from keyproxy.store.postgres.database import StatementRunner
from keyproxy.store.signing_keys import SigningKeyCache

#: A key signs no longer than this, as those of proxies.
_SIGNS_SECONDS: Final = 24 * 3600.0

#: An agent token lives at most this long, with room for clocks that differ.
_TOKEN_SECONDS_MAX: Final = 960.0


class OperatorKey:
    """The signing key of one process. It is made and published before its first use; its private half is not stored."""

    def __init__(self, keys: SigningKeyCache, now: Callable[[], Moment]) -> None:
        self._keys = keys
        self._now = now
        self._key: SigningKey | None = None
        self._making = asyncio.Lock()
        #: How many tokens were minted.
        self.minted = 0

    async def prepare(self) -> None:
        """Publish a key unless there is one that can sign. Call before `signing_key`. Raises StoreUnavailable."""
        async with self._making:
            if self._key is None or not _may_sign(self._key, self._now().wall_seconds):
                key = SigningKey.make(self._now().wall_seconds)
                await self._keys.publish(key)
                self._key = key

    def signing_key(self, now: Moment) -> SigningKey:
        """The published key. Raises a Refusal if there is none."""
        if self._key is None or now.wall_seconds > self._key.ends_wall_seconds - _TOKEN_SECONDS_MAX:
            raise Refusal(Reason.STORE_UNAVAILABLE, "no signing key is published")
        return self._key

    async def close(self) -> None:
        """Let the public key end with the last token that it signed. Raises StoreUnavailable."""
        key, self._key = self._key, None
        if key is not None:
            await self._keys.cut(key.kid, max(self._now().wall_seconds, key.signed_until_wall_seconds))


@dataclass(frozen=True, slots=True)
class OperatorMint:
    """What a directory needs to mint: the rules of the configuration, and the key of the process."""

    rules: MintRules
    key: OperatorKey
    now: Callable[[], Moment]

    def minter(self, database: StatementRunner) -> AgentTokenMint:
        """The mint over a database, or over one transaction of it."""
        return TokenMinter(database, rules=lambda: self.rules, signing_key=self.key.signing_key, now=self.now)


def mint_rules(access: AccessSettings) -> MintRules:
    """The configured bounds of agent tokens."""
    return MintRules(
        tuple(access.audiences),
        access.agent_ttl_seconds,
        access.agent_depth_max,
        access.agent_tokens_max,
        access.issuer,
    )


def _may_sign(key: SigningKey, wall_seconds: float) -> bool:
    return wall_seconds < min(key.created_wall_seconds + _SIGNS_SECONDS, key.ends_wall_seconds - _TOKEN_SECONDS_MAX)
