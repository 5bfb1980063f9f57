"""Decides which identity a request has: trust, then the headers. Both in memory; only keys may have to be fetched.

The middlewares of all frameworks use it. `Outcome` is what they act on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from keyproxy_client.incoming.assertions import AssertionInvalid, AssertionVerifier, KeysMissing, KeysUnavailable
from keyproxy_client.incoming.identity_headers import (
    DEFAULT_PREFIX,
    IdentityHeaders,
    PresentedHeaders,
    headers_under,
)
from keyproxy_client.incoming.key_set_fetch import FETCH_SECONDS_MAX
from keyproxy_client.incoming.problems import (
    IDENTITY_INVALID,
    IDENTITY_MISSING,
    IDENTITY_UNTRUSTED,
    IDENTITY_UNVERIFIABLE,
    Problem,
)
from keyproxy_client.incoming.trust import Trust
from keyproxy_client.incoming.verified_identity import Identity, IdentityInvalid

_log: Final = logging.getLogger("keyproxy_client.identity")

WARNING_SECONDS: Final = 60.0
#: A little longer than a fetch may take.
_WAIT_SECONDS: Final = FETCH_SECONDS_MAX + 1.0

_IS_REWRITTEN: Final = "; the peer's port is 0: the server takes addresses from a header (uvicorn: --no-proxy-headers)"


class Outcome(NamedTuple):
    """What a middleware does with a request.

    `identity`: None if there is none. `problem`: without an identity, the response of a guard. `is_rejected`: the
    middleware itself responds with the problem. `is_trusted`: otherwise the middleware removes all headers under the
    prefix.
    """

    identity: Identity | None
    problem: Problem | None
    is_trusted: bool
    is_rejected: bool = False


_ANONYMOUS: Final = Outcome(None, IDENTITY_MISSING, is_trusted=True)
_UNTRUSTED_PEER: Final = Outcome(None, IDENTITY_MISSING, is_trusted=False)
_UNTRUSTED_ASSERTION: Final = Outcome(None, IDENTITY_UNTRUSTED, is_trusted=False)
_INVALID: Final = Outcome(None, IDENTITY_INVALID, is_trusted=True, is_rejected=True)
_UNVERIFIABLE: Final = Outcome(None, IDENTITY_UNVERIFIABLE, is_trusted=False, is_rejected=True)


class Judge:
    """Judges requests by one trust rule. `header_prefix`: as `identity.header_prefix` of the proxy."""

    def __init__(
        self, trust: Trust, *, header_prefix: str = DEFAULT_PREFIX, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises TypeError for a value that is not a Trust, ValueError for an invalid prefix."""
        if not isinstance(trust, Trust):
            raise TypeError("trust must be Trust.unix(), Trust.loopback() or Trust.signed(...)")
        self.headers: Final[IdentityHeaders] = headers_under(header_prefix)
        self._trust: Final = trust
        self._warning: Final = _Warning(now)

    async def asgi(self, scope: Mapping[str, Any]) -> Outcome:
        """Judge a request or WebSocket handshake by its scope, in an event loop of asyncio, which nothing blocks."""
        presented, is_trusted = self._presented_asgi(scope)
        try:
            return self._decide(presented, peer_is_trusted=is_trusted, may_fetch=True)
        except KeysMissing as missing:
            await asyncio.wait([asyncio.wrap_future(missing.fetched)], timeout=_WAIT_SECONDS)
        return self._decide(presented, peer_is_trusted=is_trusted, may_fetch=False)

    def asgi_blocking(self, scope: Mapping[str, Any]) -> Outcome:
        """Like `asgi`, in a thread outside the event loop."""
        return self._waiting(*self._presented_asgi(scope))

    def wsgi(self, environ: Mapping[str, Any]) -> Outcome:
        """Judge a request by its environ. May wait for the keys of keyproxy."""
        presented = self.headers.present_environ(environ)
        return self._waiting(presented, self._trust.peer_is_trusted_wsgi(environ, presented.forwarding))

    def warn_of_removal(self, peer_port: object = None) -> None:
        """Log that identity headers were removed from an untrusted request, at most once a minute."""
        is_rewritten = self._trust.verifier is None and peer_port in (0, "0")
        self._warning.count(self._trust, _IS_REWRITTEN if is_rewritten else "")

    def _presented_asgi(self, scope: Mapping[str, Any]) -> tuple[PresentedHeaders, bool]:
        presented = self.headers.present_pairs(scope["headers"])
        return presented, self._trust.peer_is_trusted_asgi(scope, presented.forwarding)

    def _waiting(self, presented: PresentedHeaders, peer_is_trusted: bool) -> Outcome:
        try:
            return self._decide(presented, peer_is_trusted=peer_is_trusted, may_fetch=True)
        except KeysMissing as missing:
            concurrent.futures.wait([missing.fetched], timeout=_WAIT_SECONDS)
        return self._decide(presented, peer_is_trusted=peer_is_trusted, may_fetch=False)

    def _decide(self, presented: PresentedHeaders, *, peer_is_trusted: bool, may_fetch: bool) -> Outcome:
        """Decide without waiting. Raises KeysMissing if `may_fetch` and the decision takes a fetch of keys."""
        verifier = self._trust.verifier
        if verifier is not None:
            return self._decide_signed(presented, verifier, may_fetch=may_fetch)
        if not peer_is_trusted:
            return _UNTRUSTED_PEER
        try:
            identity = self.headers.identity(presented)
        except IdentityInvalid:
            return _INVALID
        return _ANONYMOUS if identity is None else Outcome(identity, None, is_trusted=True)

    def _decide_signed(self, presented: PresentedHeaders, verifier: AssertionVerifier, *, may_fetch: bool) -> Outcome:
        assertion = presented.assertion
        if assertion is None:
            return _UNTRUSTED_PEER
        if presented.fault:
            return _UNTRUSTED_ASSERTION
        try:
            identity = verifier.identity(assertion, may_fetch=may_fetch)
        except AssertionInvalid:
            return _UNTRUSTED_ASSERTION
        except KeysUnavailable:
            return _UNVERIFIABLE
        if not self.headers.agrees(presented, identity):
            return _UNTRUSTED_ASSERTION
        return Outcome(identity, None, is_trusted=True)


class _Warning:
    """Counts requests whose identity headers were removed, and logs the first of each minute."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now: Final = now
        self._lock: Final = threading.Lock()
        self._next_at = float("-inf")
        self._count = 0

    def count(self, trust: Trust, reason: str) -> None:
        now = self._now()
        with self._lock:
            self._count += 1
            if now < self._next_at:
                return
            self._next_at = now + WARNING_SECONDS
            count, self._count = self._count, 0
        _log.warning(
            "removed identity headers from untrusted requests: %d since the last warning; %r%s", count, trust, reason
        )
