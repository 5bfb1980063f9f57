"""The public keys of keyproxy, from its JWKS: cached for `max-age`, and fetched again for an unknown key id.

A lookup never waits. It raises KeysMissing with a future that is done once a fetch has ended; its caller waits in the way
of its own interface and looks up again. Fetches run one at a time, in a thread of their own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final

from keyproxy_client.incoming.key_set_fetch import FetchFailed, KeySetFetcher

_log: Final = logging.getLogger("keyproxy_client.identity")

#: How often an unknown key id causes a fetch.
UNKNOWN_SECONDS: Final = 10.0
#: How soon a fetch that failed is repeated.
_RETRY_SECONDS: Final = 1.0
#: At this share of its life a key set is replaced, so that no request waits for that and a short outage has no effect.
_REFRESH_SHARE: Final = 0.75


class KeysMissing(Exception):
    """The key is not in memory; `fetched` is done once a fetch has ended, also if it failed."""

    def __init__(self, fetched: Future[None]) -> None:
        super().__init__("a fetch of the key set is under way")
        self.fetched: Final = fetched


class KeysUnavailable(Exception):
    """The key set cannot be fetched now, so that nothing can be verified."""


class KeySets:
    """The keys of one JWKS. Safe in threads. `keys_of` turns the JSON into keys by id; it raises ValueError."""

    def __init__(
        self,
        fetcher: KeySetFetcher,
        keys_of: Callable[[Any], Mapping[str, Any]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetcher: Final = fetcher
        self._keys_of: Final = keys_of
        self._now: Final = now
        self._lock: Final = threading.Lock()
        self._keys: Mapping[str, Any] = {}
        self._fresh_until = self._refresh_at = float("-inf")
        self._attempt_at = float("-inf")
        self._unknown_at = float("-inf")
        self._last_failed = False
        self._fetch: Future[None] | None = None
        self.fetches = 0

    def key(self, kid: str, *, may_fetch: bool) -> Any | None:
        """The key with this id, None if keyproxy has none. Raises KeysUnavailable, and KeysMissing if `may_fetch`."""
        now = self._now()
        if now < self._refresh_at:
            key = self._keys.get(kid)
            if key is not None:
                return key
        with self._lock:
            if now < self._fresh_until:
                return self._fresh_key(kid, now, may_fetch=may_fetch)
            if may_fetch and (self._fetch is not None or now >= self._attempt_at):
                raise KeysMissing(self._fetch or self._start(now))
            raise KeysUnavailable

    def _fresh_key(self, kid: str, now: float, *, may_fetch: bool) -> Any | None:
        """The key of a set that is still fresh, with the lock held."""
        key = self._keys.get(kid)
        if key is not None:
            if self._fetch is None and now >= max(self._refresh_at, self._attempt_at):
                self._start(now)
            return key
        if may_fetch and now >= self._unknown_at + UNKNOWN_SECONDS:
            self._unknown_at = now
            raise KeysMissing(self._fetch or self._start(now))
        if may_fetch and self._fetch is not None:
            raise KeysMissing(self._fetch)
        if self._last_failed:
            # The fetch that would have shown whether the key exists failed.
            raise KeysUnavailable
        return None

    def _start(self, now: float) -> Future[None]:
        """Start a fetch, with the lock held."""
        fetch: Future[None] = Future()
        # A waiter that gives up must not cancel it for the others.
        fetch.set_running_or_notify_cancel()
        self._fetch = fetch
        self._attempt_at = now + _RETRY_SECONDS
        self.fetches += 1
        thread = threading.Thread(target=self._run, args=(fetch, now), name="keyproxy-jwks", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # No thread can start, as at the end of the interpreter.
            self._fetch = None
            raise KeysUnavailable from None
        return fetch

    def _run(self, fetch: Future[None], started: float) -> None:
        keys, max_age_seconds = None, 0.0
        try:
            content, max_age_seconds = self._fetcher.fetch()
            keys = self._keys_of(content)
        except (FetchFailed, ValueError) as error:
            _log.warning("cannot fetch the keys of keyproxy from %s: %s", self._fetcher.shown, error)
        finally:
            # Whatever was raised: requests wait for the end of the fetch, and no other begins before it.
            self._end(fetch, keys, started, max_age_seconds)

    def _end(self, fetch: Future[None], keys: Mapping[str, Any] | None, started: float, max_age_seconds: float) -> None:
        with self._lock:
            self._fetch = None
            self._last_failed = keys is None
            self._attempt_at = self._now() + _RETRY_SECONDS
            if keys is not None:
                self._keys = keys
                self._fresh_until = started + max_age_seconds
                self._refresh_at = started + max_age_seconds * _REFRESH_SHARE
        fetch.set_result(None)

    def __repr__(self) -> str:
        return f"KeySets({self._fetcher.shown}, {len(self._keys)} keys)"
