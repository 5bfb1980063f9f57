"""The public halves of all signing keys: published, cut, verified with, and served as a JSON Web Key Set.

They are read at start, when the change feed delivers a change, and when a token has an unknown `kid`: then at most once
per second, however many such tokens arrive. While the store is down, the keys that were read last are used until they
end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from typing import Final

import cachetools

from keyproxy.model import Missing, Moment
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.signing_key import SigningKey, VerifyingKey
from keyproxy.signing.token_check import AcceptedTokens, SignedToken
from keyproxy.store.background import BackgroundTask
from keyproxy.store.postgres.database import StatementRunner, StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

#: With more keys, those that end first are left out: many proxies that crash again and again.
_KEYS_MAX: Final = 10_000

#: How many tokens with an unknown `kid` may wait for the next reading.
_WAITING_MAX: Final = 1_000

#: The shortest time between two readings: after a change, and for unknown keys.
_CHANGED_SECONDS: Final = 0.2
_UNKNOWN_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = (0.1, 0.2, 0.4, 0.8, 1.5)

#: A key set that was read longer ago is read again before it is served.
_SERVED_SECONDS: Final = 0.5


class SigningKeyCache:
    """All signing keys in memory: see the module. `rejected`: how many tokens failed the check without a query."""

    def __init__(self, database: StatementRunner, rules: AcceptedTokens, now: Callable[[], Moment]) -> None:
        self.lasting = BackgroundTask("signing_keys")
        self.rules = rules
        self.rejected = 0
        self._database = database
        self._now = now
        self._keys: dict[str, VerifyingKey] = {}
        #: The rows that were read last: building a key again costs more than reading it.
        self._rows: dict[str, tuple[str, VerifyingKey | None]] = {}
        #: When the last reading began, in monotonic seconds; None: there was none that succeeded.
        self._read_mono: float | None = None
        #: When the last reading has failed; None: it has not.
        self._failed_mono: float | None = None
        self._began_mono = 0.0
        self._due_mono: float | None = 0.0
        self._wake = asyncio.Event()
        self._reading = asyncio.Lock()
        self._waiting: list[asyncio.Future[None]] = []
        #: Keys that the last second's reading did not find.
        self._absent: cachetools.TTLCache[str, bool] = cachetools.TTLCache(
            _WAITING_MAX, _UNKNOWN_SECONDS, timer=lambda: now().mono_seconds
        )

    def start(self) -> None:
        """Start reading changes."""
        self._wake.set()
        self.lasting.start(self._follow, self._fail_waiting)

    async def close(self) -> None:
        """Stop reading changes. Tokens that wait for a key are refused."""
        await self.lasting.end()
        self._fail_waiting(StoreUnavailable("the store is closed"))

    # -- tokens

    def verify(self, token: bytes, now: Moment) -> None:
        """Check an agent token without a query. Never waits.

        Raises a Refusal (KEY_INVALID, KEY_EXPIRED), or Missing if the keys that are known do not include its key.
        """
        try:
            signed = SignedToken.parse(token)
            key = self._keys.get(signed.kid)
            if key is not None:
                signed.check(key, self.rules, now.wall_seconds)
                return
            if signed.kid in self._absent:
                raise _unknown_key()
        except Refusal:
            self.rejected += 1
            raise
        raise Missing("signing key", lambda _patience: self._seek(signed.kid))

    async def _seek(self, kid: str) -> None:
        """Wait for a reading that begins after the token has arrived. Raises a Refusal."""
        if len(self._waiting) >= _WAITING_MAX:
            raise Refusal(Reason.OVERLOADED, "too many agent tokens with unknown keys")
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._read_at(self._began_mono + _UNKNOWN_SECONDS)
        await waiting
        if kid not in self._keys:
            self._absent[kid] = True
            self.rejected += 1
            raise _unknown_key()

    # -- keys

    def has(self, kid: str) -> bool:
        """Whether the table has the key, as it was read last."""
        return kid in self._keys

    @property
    def is_read(self) -> bool:
        """Whether the keys were ever read."""
        return self._read_mono is not None

    def live(self) -> list[VerifyingKey]:
        """All keys that have not ended."""
        wall = self._now().wall_seconds
        return [key for key in self._keys.values() if wall < key.ends_wall_seconds]

    def jwks(self) -> bytes:
        """The live keys as a JSON Web Key Set, as they were read last."""
        return json.dumps({"keys": [key.jwk for key in self.live()]}, separators=(",", ":")).encode("ascii")

    async def current_jwks(self) -> bytes:
        """The live keys as a JSON Web Key Set, at most half a second old unless the store is down.

        While readings fail, one request at a time waits for the next; the others get what was read last. Raises a Refusal
        if the keys were never read.
        """
        before = self._read_mono, self._failed_mono
        if self._is_set_due():
            async with self._reading:
                # Another request may have waited for the same reading.
                if before == (self._read_mono, self._failed_mono):
                    with contextlib.suppress(StoreUnavailable, StoreConflict):
                        await self._read()
        if self._read_mono is None:
            raise Refusal(Reason.STORE_UNAVAILABLE, "the signing keys are not read yet")
        return self.jwks()

    def _is_set_due(self) -> bool:
        """Whether a request for the key set has to wait for a reading."""
        if self._read_mono is None:
            return True
        if self._failed_mono is not None and self._reading.locked():
            return False
        last = self._read_mono if self._failed_mono is None else self._failed_mono
        return self._now().mono_seconds - last >= _SERVED_SECONDS

    async def publish(self, key: SigningKey) -> None:
        """Store the public half, if it is not stored yet. Raises StoreUnavailable or StoreConflict."""
        jwk = key.public_jwk()
        # Not during a reading: it might not see the key, and would replace it here.
        async with self._reading:
            await self._database.fetch(
                "publish_signing_key", key.kid, json.dumps(jwk), key.created_wall_seconds, key.ends_wall_seconds
            )
            if key.kid not in self._keys:
                self._keys[key.kid] = VerifyingKey(jwk, kid=key.kid, ends_wall=key.ends_wall_seconds)

    async def cut(self, kid: str, ends_wall_seconds: float) -> None:
        """Let a key end at this time, unless it ends before. Raises StoreUnavailable or StoreConflict."""
        await self._database.fetch("cut_signing_key", kid, ends_wall_seconds)
        key = self._keys.get(kid)
        if key is not None:
            key.ends_wall_seconds = min(key.ends_wall_seconds, ends_wall_seconds)

    # -- reading

    def changed(self) -> None:
        """A key was published, cut or removed, or changes may have been missed: read all keys."""
        self._read_at(self._began_mono + _CHANGED_SECONDS)

    async def read(self) -> None:
        """Read all keys. Raises StoreUnavailable or StoreConflict."""
        async with self._reading:
            await self._read()

    async def _read(self) -> None:
        began = self._began_mono = self._now().mono_seconds
        try:
            rows = await self._database.fetch("signing_keys", _KEYS_MAX)
        except (StoreUnavailable, StoreConflict):
            self._failed_mono = self._now().mono_seconds
            raise
        before, self._rows, self._keys = self._rows, {}, {}
        for row in rows:
            kid, text = row["kid"], row["jwk"]
            known = before.get(kid)
            key = known[1] if known is not None and known[0] == text else _verifying_key(kid, text)
            self._rows[kid] = text, key
            if key is not None:
                key.ends_wall_seconds = row["ends_wall_seconds"]
                self._keys[kid] = key
        self._read_mono, self._failed_mono = began, None
        self._absent.clear()

    def _read_at(self, mono: float) -> None:
        if self._due_mono is None or mono < self._due_mono:
            self._due_mono = mono
            self._wake.set()

    async def _follow(self) -> None:
        failures = 0
        while True:
            await self._until_due()
            # Cleared before reading, so that a change during it causes another reading.
            self._due_mono = None
            waiting, self._waiting = self._waiting, []
            failure: Exception | None = StoreUnavailable("reading them failed")
            try:
                await self.read()
                failure, failures = None, 0
            except (StoreUnavailable, StoreConflict) as error:
                _log.debug("reading the signing keys failed, retrying: %s", error)
                failure = error
                self._read_at(self._now().mono_seconds + _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
                failures += 1
            finally:
                _resolve(waiting, failure)

    async def _until_due(self) -> None:
        while True:
            self._wake.clear()
            left = None if self._due_mono is None else self._due_mono - self._now().mono_seconds
            if left is not None and left <= 0.0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()

    def _fail_waiting(self, error: Exception) -> None:
        waiting, self._waiting = self._waiting, []
        _resolve(waiting, error)
        self._read_at(self._now().mono_seconds)


def _resolve(waiting: list[asyncio.Future[None]], error: Exception | None) -> None:
    for future in waiting:
        if future.done():
            continue  # the request was cancelled
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(Refusal(Reason.STORE_UNAVAILABLE, f"the signing keys cannot be read: {error}"))


def _verifying_key(kid: str, jwk: str) -> VerifyingKey | None:
    try:
        return VerifyingKey(json.loads(jwk), kid=kid, ends_wall=0.0)
    except ValueError as error:
        _log.error("signing key %s is ignored: %s", kid, error)
        return None


def _unknown_key() -> Refusal:
    return Refusal(Reason.KEY_INVALID, "agent token: signed with an unknown key")
