"""Fetches documents that strangers name, without being led into the networks of this machine.

The name is resolved once. If any of its addresses is neither public nor in a network of the operator, there is no
connection; otherwise the connection uses one of these addresses, whatever the name resolves to by then.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, TypeAlias

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from keyproxy.oauth.client_document import DocumentUrl
from keyproxy.oauth.client_refusals import DocumentRefused, DocumentUnavailable
from keyproxy.oauth.public_addresses import IpAddress, IpNetwork, is_public, is_within

#: Resolves a host and port to IP addresses. Raises OSError.
Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]

BYTES_MAX: Final = 5 << 10
FETCH_SECONDS_MAX: Final = 5.0
FRESH_SECONDS_MIN: Final = 300.0
FRESH_SECONDS_MAX: Final = 86_400.0

#: Lookups that hang block these threads, not those that the database's name needs.
_LOOKUPS_MAX: Final = 16

_MAX_AGE: Final = re.compile(r"max-age=\"?([0-9]{1,10})\"?")
_NOT_CACHED: Final = ("no-store", "no-cache")
_TOO_MANY_REQUESTS: Final = 429
_REASON_CHARACTERS_MAX: Final = 300
_SERVER_ERRORS: Final = 500


class FetchedDocument(NamedTuple):
    """A document, and how long it is fresh."""

    content: bytes
    fresh_seconds: float


class DocumentFetcher:
    """Fetches documents: see the module."""

    def __init__(self, networks: Collection[IpNetwork], tls: ssl.SSLContext, *, resolve: Resolve | None = None) -> None:
        """`networks`: the private ones that documents may come from. `tls`: which certificates are trusted."""
        self._networks = tuple(networks)
        self._tls = tls
        self._lookups = ThreadPoolExecutor(_LOOKUPS_MAX, "documents")
        self._resolve = self._look_up if resolve is None else resolve

    async def fetch(self, url: DocumentUrl) -> FetchedDocument:
        """Fetch a document. Raises DocumentRefused; DocumentUnavailable if a later attempt may succeed."""
        try:
            async with asyncio.timeout(FETCH_SECONDS_MAX):
                addresses = self._checked(url, await self._resolve(url.host, url.port))
                return await self._get(url, addresses)
        except TimeoutError:
            raise DocumentUnavailable(f"no response within {FETCH_SECONDS_MAX:g} s") from None
        except (OSError, aiohttp.ClientError) as error:
            # The text may quote the response.
            reason = f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS_MAX]
            raise DocumentUnavailable(f"cannot be fetched: {reason}") from error

    def _checked(self, url: DocumentUrl, addresses: Sequence[str]) -> list[str]:
        """The addresses to connect to. Raises DocumentRefused if one of the host's may not be connected to."""
        if not addresses:
            raise DocumentUnavailable("the host has no address")
        parsed = [(text, _parsed(text)) for text in addresses]
        own = [text for text, address in parsed if address is not None and is_within(address, self._networks)]
        # The name localhost has two addresses, and the operator need not name both.
        is_loopback_allowed = any(ipaddress.ip_address(text).is_loopback for text in own)
        for text, address in parsed:
            if text in own or (is_loopback_allowed and address is not None and address.is_loopback):
                continue
            if address is None or not is_public(address):
                raise DocumentRefused(f"the host has the address {text}, which is not public")
            if not url.is_plain:
                raise DocumentRefused("the URL has an IP address, or another port than 443")
            own.append(text)
        return own

    async def _get(self, url: DocumentUrl, addresses: Sequence[str]) -> FetchedDocument:
        connector = aiohttp.TCPConnector(
            resolver=_CheckedAddresses(addresses),
            socket_factory=lambda found: _socket(found, addresses),
            ssl=self._tls,
            use_dns_cache=False,
            force_close=True,
        )
        async with (
            aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False
            ) as session,
            session.get(
                URL(url.text, encoded=True),
                allow_redirects=False,
                headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "keyproxy"},
            ) as response,
        ):
            _check_head(response)
            content = bytearray()
            async for part in response.content.iter_any():
                content += part
                if len(content) > BYTES_MAX:
                    raise DocumentRefused(f"the document has more than {BYTES_MAX} bytes")
            return FetchedDocument(bytes(content), _fresh_seconds(response.headers.get("Cache-Control", "")))

    async def _look_up(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._lookups, _addresses, host, port)
        return list(dict.fromkeys(found))


class _CheckedAddresses(AbstractResolver):
    """Resolves every name to the addresses that were checked."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        del family
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        """Nothing is open."""


def _addresses(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _parsed(text: str) -> IpAddress | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _socket(found: Any, addresses: Sequence[str]) -> socket.socket:
    family, kind, protocol, _, (address, *_) = found
    if address not in addresses:
        # Whatever the library resolves by itself: an address that was not checked is never connected to.
        raise DocumentRefused(f"the address {address} was not checked")
    return socket.socket(family, kind, protocol)


def _check_head(response: aiohttp.ClientResponse) -> None:
    if response.status == _TOO_MANY_REQUESTS or response.status >= _SERVER_ERRORS:
        raise DocumentUnavailable(f"the response has the status {response.status}")
    if response.status != 200:
        raise DocumentRefused(f"the response has the status {response.status}")
    if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise DocumentRefused("the response has a content encoding")
    if (response.content_length or 0) > BYTES_MAX:
        raise DocumentRefused(f"the document has more than {BYTES_MAX} bytes")


def _fresh_seconds(cache_control: str) -> float:
    directives = cache_control.lower()
    stated = _MAX_AGE.search(directives)
    if stated is None or any(word in directives for word in _NOT_CACHED):
        return FRESH_SECONDS_MIN
    return min(max(float(stated[1]), FRESH_SECONDS_MIN), FRESH_SECONDS_MAX)
