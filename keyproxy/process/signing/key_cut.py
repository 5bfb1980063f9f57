"""At a graceful stop: signing keys end when the last of what they have signed does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Final

from keyproxy.platform import clock
from keyproxy.signing.token_check import ACCEPTS_NONE
from keyproxy.store.postgres.database import Database, StoreConflict, StoreUnavailable
from keyproxy.store.signing_keys import SigningKeyCache

_log = logging.getLogger(__name__)

#: A stop does not wait longer for the store.
_CUT_SECONDS: Final = 3.0


async def cut_keys(store: SigningKeyCache, ends: Mapping[str, float]) -> None:
    """Let keys end at these times, by `kid`. If that fails, they keep their planned end."""
    try:
        async with asyncio.timeout(_CUT_SECONDS):
            for kid, wall_seconds in ends.items():
                await store.cut(kid, wall_seconds)
    except (StoreUnavailable, StoreConflict, TimeoutError) as error:
        _log.warning("the signing keys verify until their planned end: %s", error or "timeout")


async def cut_keys_of(dsn: str, ends: Mapping[str, float]) -> None:
    """The same for a process without a store."""
    database = Database(dsn, pool_size_max=1, statement_timeout_seconds=_CUT_SECONDS)
    await database.open()
    try:
        await cut_keys(SigningKeyCache(database, ACCEPTS_NONE, clock.now), ends)
    finally:
        await database.close()
