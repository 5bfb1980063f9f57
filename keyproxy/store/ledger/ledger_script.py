"""The connection to Redis or Valkey: runs ledger.lua in the current generation. See redis_backend.py."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from keyproxy.store.ledger import redis_codec as wire
from keyproxy.store.postgres.database import Database, StoreUnavailable

_log = logging.getLogger(__name__)

_SCRIPT: Final = Path(__file__).with_name("ledger.lua").read_bytes()
_SCRIPT_SHA: Final = hashlib.sha1(_SCRIPT, usedforsecurity=False).hexdigest()

_CONNECTIONS_MAX: Final = 8


class GenerationLost(Exception):
    """The generation does not exist any more."""


class LedgerScript:
    """Runs the operations of ledger.lua, for the ledger of one database."""

    def __init__(self, url: str, database: Database, *, timeout_seconds: float) -> None:
        """`timeout_seconds` bounds one call. Opens no connection. Raises ValueError if the URL is invalid."""
        self._database = database
        self._timeout_seconds = timeout_seconds
        # No retries: a repeated message is rejected as late. The ledger client sends a new one.
        self._client = Redis.from_url(
            url, protocol=2, retry=Retry(NoBackoff(), 0), max_connections=_CONNECTIONS_MAX,
            socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds,
        )  # fmt: skip
        self._key = ""
        self._generation = ""

    async def generation(self) -> str:
        """The current generation; starts one if there is none. Raises StoreUnavailable."""
        if not self._key:
            (row,) = await self._database.fetch("ledger_id")
            self._key = f"keyproxy:{{{row['id']}}}:{wire.VERSION}"
        if not self._generation:
            await self._refuse_eviction()
            self._generation = await self.call("begin", secrets.token_hex(8))
        return self._generation

    def forget(self, generation: str) -> None:
        """Look for another generation before the next call."""
        if self._generation == generation:
            self._generation = ""

    async def call(self, operation: str, generation: str, /, **ask: object) -> Any:
        """Run one operation. Raises StoreUnavailable; GenerationLost if the generation has ended."""
        answer, _ = await self.run(operation, generation, b"", ask)
        return answer

    async def run(self, operation: str, generation: str, lines: bytes, ask: Mapping[str, object]) -> tuple[Any, bytes]:
        """As `call`, with the lines of a message. Return the result, and the packed replies after it."""
        arguments = (1, self._key, operation, generation, orjson.dumps(ask), lines)
        try:
            answered = await self._command("EVALSHA", _SCRIPT_SHA, *arguments)
        except NoScriptError:
            answered = await self._command("EVAL", _SCRIPT, *arguments)
        head, _, replies = answered.partition(b"\n")
        answer = orjson.loads(head)
        if answer == "lost":
            _log.warning("Redis has lost its memory, or may have: starting a new generation, existing leases end")
            self.forget(generation)
            raise GenerationLost
        return answer, replies

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _refuse_eviction(self) -> None:
        memory = await self._command("INFO", "memory")
        policy = memory.get("maxmemory_policy", "noeviction")
        if int(memory.get("maxmemory", 0)) and policy != "noeviction":
            raise StoreUnavailable(
                f"Redis may evict keys (maxmemory-policy {policy}): the ledger requires noeviction, or no maxmemory"
            )

    async def _command(self, *words: object) -> Any:
        try:
            # On cancellation or timeout redis-py closes the connection: its next reply would belong to this command.
            async with asyncio.timeout(self._timeout_seconds):
                return await self._client.execute_command(*words)  # type: ignore[no-untyped-call]
        except NoScriptError:
            raise
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(f"Redis: {type(error).__name__}: {error}") from error
