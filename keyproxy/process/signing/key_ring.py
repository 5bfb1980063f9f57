"""The keys that this process signs with: published first, used then, and replaced before they end.

A key is used once its public half is in the store. At a planned rotation it is used a minute later, when verifiers have
had time to read it; until then the previous one signs. If a key cannot be published, the previous one signs until a
quarter of an hour before its end, so that nothing outlives the key that signed it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Final

from keyproxy.model import Moment
from keyproxy.platform import clock
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.signing_key import SigningKey
from keyproxy.store.background import BackgroundTask
from keyproxy.store.postgres.database import StoreConflict, StoreUnavailable
from keyproxy.store.signing_keys import SigningKeyCache

_log = logging.getLogger(__name__)

#: How long a new key is published before it is used, at a planned rotation.
_LEAD_SECONDS: Final = 60.0

#: The longest life of what is signed.
_MARGIN_SECONDS: Final = 900.0

#: How long verifiers may need to read a key that is published at a start.
START_SECONDS: Final = 2.0

_RETRY_SECONDS: Final = (0.1, 0.2, 0.4, 0.8, 1.5)
_LOOK_SECONDS: Final = 5.0


class _RingKey:
    """A key and its standing. `due_mono`: when it may be used; None: it is not published."""

    __slots__ = ("due_mono", "is_first", "key")

    def __init__(self, key: SigningKey, *, is_first: bool) -> None:
        self.key = key
        self.is_first = is_first
        self.due_mono: float | None = None


class SigningKeyRing:
    """The signing keys of this process: see the module. `usable` returns the one that signs."""

    def __init__(
        self, keys: Sequence[SigningKey], store: SigningKeyCache, now: Callable[[], Moment] = clock.now
    ) -> None:
        """`keys`: the oldest first."""
        self.lasting = BackgroundTask("signing_key_publishing")
        self._now = now
        self._store = store
        self._keys: list[_RingKey] = []
        self._wake = asyncio.Event()
        self._attempted = asyncio.Event()
        #: Whether verifiers get time to read a key that is published at a start.
        self.waits_for_verifiers = False
        self.adopt(keys)

    def adopt(self, keys: Sequence[SigningKey]) -> None:
        """Sign with these keys, the oldest first; those that are known already stay as they are."""
        known = {entry.key.kid for entry in self._keys}
        for key in keys:
            if key.kid not in known:
                self._keys.append(_RingKey(key, is_first=not self._keys))
        wall = self._now().wall_seconds
        self._keys = [entry for entry in self._keys if wall < entry.key.ends_wall_seconds or entry is self._keys[-1]]
        self._wake.set()

    def usable(self, now: Moment) -> SigningKey:
        """The key to sign with. Raises a Refusal (STORE_UNAVAILABLE) if none is published."""
        unused: SigningKey | None = None
        for entry in reversed(self._keys):
            if entry.due_mono is None or now.wall_seconds >= entry.key.ends_wall_seconds - _MARGIN_SECONDS:
                continue
            if now.mono_seconds >= entry.due_mono:
                return entry.key
            if unused is None and not entry.is_first:
                unused = entry.key
        if unused is None:
            raise Refusal(Reason.STORE_UNAVAILABLE, "no signing key is published")
        # The previous key is near its end: the next one is published, which is what matters.
        return unused

    def age_seconds(self) -> float:
        """The age of the key that signs; 0 if there is none."""
        now = self._now()
        try:
            return max(0.0, now.wall_seconds - self.usable(now).created_wall_seconds)
        except Refusal:
            return 0.0

    def signed_until(self) -> dict[str, float]:
        """Until when what was signed in this process is valid, by `kid`."""
        return {entry.key.kid: entry.key.signed_until_wall_seconds for entry in self._keys}

    # -- publishing

    def start(self) -> None:
        """Start publishing keys."""
        self.lasting.start(self._follow)

    async def close(self) -> None:
        """Stop publishing keys."""
        await self.lasting.end()

    async def until_started(self, seconds: float) -> None:
        """At a start: wait until the first key may be used, or its first publishing has failed; for this long at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._attempted.wait()
        due = self._keys[0].due_mono
        if due is not None:
            await asyncio.sleep(max(0.0, due - self._now().mono_seconds))

    async def publish_in(self, store: SigningKeyCache) -> None:
        """Publish all keys in another store, before it replaces this one. Raises StoreUnavailable or StoreConflict."""
        for entry in self._keys:
            await store.publish(entry.key)

    def change_store(self, store: SigningKeyCache) -> None:
        """Use another store, in which all keys are published."""
        self._store = store

    async def _follow(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            try:
                await self._publish()
                failures = 0
                seconds = _LOOK_SECONDS
            except (StoreUnavailable, StoreConflict) as error:
                if not failures:
                    _log.warning("the signing key cannot be published: %s", error)
                seconds = _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)]
                failures += 1
            self._attempted.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    async def _publish(self) -> None:
        """Publish what is not published, or was removed by an operator or a restored backup."""
        for entry in self._keys:
            if entry.due_mono is None:
                await self._store.publish(entry.key)
                entry.due_mono = self._now().mono_seconds + await self._lead_seconds(entry)
            elif self._store.is_read and not self._store.has(entry.key.kid):
                await self._store.publish(entry.key)

    async def _lead_seconds(self, entry: _RingKey) -> float:
        if not entry.is_first:
            return _LEAD_SECONDS
        if not self.waits_for_verifiers:
            return 0.0
        await self._store.read()
        own = {one.key.kid for one in self._keys}
        return START_SECONDS if any(key.kid not in own for key in self._store.live()) else 0.0
