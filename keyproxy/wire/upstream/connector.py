"""Open connections to one upstream: its address, TLS, and what to report of a failure."""

from __future__ import annotations

import asyncio
import errno
import logging
import ssl
from collections.abc import Callable
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from keyproxy.reasons import Reason, Refusal

_log = logging.getLogger(__name__)

#: Errors of this host, not of the upstream: no file descriptors, ports or memory left.
_OUR_LIMITS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


class Address(NamedTuple):
    """An upstream's address: `path` of a unix socket, or `host` and `port`. `authority` is for a missing Host."""

    host: str
    port: int
    path: str
    authority: bytes
    is_tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Address:
        """Parse a checked `upstream.url`."""
        if url.startswith("unix:"):
            return cls("", 0, url.removeprefix("unix:"), b"localhost")
        parts = urlsplit(url)
        is_tls = parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        return cls(parts.hostname or "", port, "", parts.netloc.encode("ascii"), is_tls)


class UpstreamConnector:
    """Opens connections to one upstream. `unreachable_because`: why the last attempt failed; empty: it did not."""

    def __init__(
        self, url: str, loop: asyncio.AbstractEventLoop, timeout_seconds: float, tls: ssl.SSLContext | None
    ) -> None:
        """`tls`: for an https URL, how its certificate is verified."""
        self.address = Address.parse(url)
        self.unreachable_because = ""
        self._loop = loop
        self._timeout_seconds = timeout_seconds
        self._tls = tls if self.address.is_tls else None
        if self.address.is_tls and tls is None:
            raise ValueError("an https upstream needs a TLS context")

    async def open(self, make: Callable[[], asyncio.Protocol]) -> Refusal | None:
        """Open a connection with this protocol. Return the refusal for a request that waits for it if that fails."""
        address = self.address
        try:
            async with asyncio.timeout(self._timeout_seconds):
                if address.path:
                    await self._loop.create_unix_connection(make, address.path)
                else:
                    await self._loop.create_connection(make, address.host, address.port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            # ssl.SSLError is an OSError: a certificate that does not verify is an upstream that cannot be reached.
            return self._failed(str(error) or "timed out", is_our_limit=getattr(error, "errno", None) in _OUR_LIMITS)
        self.unreachable_because = ""
        return None

    def _failed(self, why: str, *, is_our_limit: bool) -> Refusal:
        if not self.unreachable_because:
            _log.warning("upstream unreachable: %s: %s", self.address.path or self.address.authority.decode(), why)
        self.unreachable_because = why
        reason = Reason.OVERLOADED if is_our_limit else Reason.UPSTREAM_UNREACHABLE
        return Refusal(reason, f"connecting failed: {why}")
