"""Mints on behalf of operators, by the admin process and by commands: their own signing key, and the rules.

Imported only where tokens are minted: the libraries for signatures take longer to load than a command runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

from keyproxy.config.delegation_settings import AccessSettings
from keyproxy.model import Moment
from keyproxy.ports.agent_token_mint import AgentTokenMint
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.signing_key import SigningKey
from keyproxy.signing.token_check import ACCEPTS_NONE
from keyproxy.store.agent_tokens.minter import TokenMinter
from keyproxy.store.directory.agents.agent_tokens import OperatorMint
from keyproxy.store.postgres.database import Database, StatementRunner, StoreConflict, StoreUnavailable
from keyproxy.store.signing_keys import SigningKeyCache

_log = logging.getLogger(__name__)

#: A key signs for this long, as those of proxies.
_SIGNS_SECONDS: Final = 24 * 3600.0

#: The longest life of a token, with room for clocks that differ.
_TOKEN_SECONDS_MAX: Final = 960.0


class OperatorKey:
    """The signing key of one process. It is made and published before its first use; its private half is not stored."""

    def __init__(self, keys: SigningKeyCache, now: Callable[[], Moment]) -> None:
        self._keys = keys
        self._now = now
        self._key: SigningKey | None = None
        self._making = asyncio.Lock()
        #: How many tokens this process has minted.
        self.minted = 0

    async def prepare(self) -> None:
        """Publish a key, unless there is one that can sign. Call before minting, outside of any transaction.

        Raises StoreUnavailable.
        """
        async with self._making:
            wall = self._now().wall_seconds
            if self._key is None or wall >= self._key.created_wall_seconds + _SIGNS_SECONDS:
                key = SigningKey.make(wall)
                await self._keys.publish(key)
                self._key = key

    def signing_key(self, now: Moment) -> SigningKey:
        """The published key. Raises a Refusal if there is none, or it would end before a token."""
        if self._key is None or now.wall_seconds + _TOKEN_SECONDS_MAX > self._key.ends_wall_seconds:
            raise Refusal(Reason.STORE_UNAVAILABLE, "no signing key is published")
        return self._key

    async def close(self) -> None:
        """Let the public key end with the last token that it signed."""
        key, self._key = self._key, None
        if key is None:
            return
        try:
            await self._keys.cut(key.kid, max(self._now().wall_seconds, key.signed_until_wall_seconds))
        except (StoreUnavailable, StoreConflict) as error:
            # It ends 25 hours after it was made.
            _log.warning("signing key %s is not withdrawn early: %s", key.kid, error)


class SigningMint(OperatorMint):
    """Mints with the key of this process."""

    def __init__(self, access: AccessSettings, key: OperatorKey, now: Callable[[], Moment]) -> None:
        super().__init__(access.mint_rules())
        self.key = key
        self._now = now

    def minter(self, database: StatementRunner) -> AgentTokenMint:
        return TokenMinter(database, rules=lambda: self.rules, signing_key=self.key.signing_key, now=self._now)

    def count(self) -> None:
        self.key.minted += 1


@contextlib.asynccontextmanager
async def minting(database: Database, access: AccessSettings, now: Callable[[], Moment]) -> AsyncIterator[SigningMint]:
    """The mint of a command: its key ends with what it signed."""
    key = OperatorKey(SigningKeyCache(database, ACCEPTS_NONE, now), now)
    await key.prepare()
    try:
        yield SigningMint(access, key, now)
    finally:
        await key.close()
