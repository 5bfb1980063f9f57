"""HTTP requests to the OpenID provider: no redirects, no cookies, responses of a bounded size in a bounded time."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Final

import aiohttp

from keyproxy.authorize.oidc.provider_metadata import ProviderUnavailable
from keyproxy.wire.tls import client_context

#: How long a login waits for the provider in all.
PROVIDER_SECONDS: Final = 10.0

_RESPONSE_BYTES_MAX: Final = 262_144
_OK: Final = 200
_CLIENT_ERRORS: Final = range(400, 500)
_TOO_MANY_REQUESTS: Final = 429


class ProviderHttp:
    """Requests to one provider. The operator configures its issuer, and so also the hosts that it names."""

    def __init__(self, issuer: str, ca_file: str, seconds_max: float) -> None:
        """`ca_file`: replaces the system's CAs. Raises TlsError."""
        # Loading the system's CAs takes a tenth of a second. A provider on this machine needs none.
        is_https = issuer.startswith("https:")
        self._tls: ssl.SSLContext | bool = client_context(ca_file) if is_https or ca_file else True
        self._seconds_max = seconds_max

    async def get(self, url: str) -> bytes:
        """The body of a document. Raises ProviderUnavailable for any other status than 200."""
        status, body = await self._sent("GET", url, None, {})
        if status != _OK:
            raise ProviderUnavailable(f"{url} responds with status {status}")
        return body

    async def post(self, url: str, form: Mapping[str, str], headers: Mapping[str, str]) -> tuple[bool, bytes]:
        """Post a form. Return whether it is accepted, and the body. Raises ProviderUnavailable without a decision."""
        status, body = await self._sent("POST", url, form, headers)
        if status == _OK:
            return True, body
        if status in _CLIENT_ERRORS and status != _TOO_MANY_REQUESTS:
            return False, body
        raise ProviderUnavailable(f"{url} responds with status {status}")

    async def _sent(
        self, method: str, url: str, form: Mapping[str, str] | None, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        # Each request has a connection of its own: a code must not be sent on one that the provider is closing.
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls, force_close=True),
            timeout=aiohttp.ClientTimeout(total=self._seconds_max),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "application/json", "User-Agent": "keyproxy"},
        )
        try:
            async with (
                session,
                session.request(method, url, data=form, headers=headers, allow_redirects=False) as response,
            ):
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > _RESPONSE_BYTES_MAX:
                        raise ProviderUnavailable(f"{url} responds with more than {_RESPONSE_BYTES_MAX} bytes")
                return response.status, bytes(body)
        except TimeoutError:
            raise ProviderUnavailable(f"{url} does not respond within {self._seconds_max:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ProviderUnavailable(f"{url}: {type(error).__name__}: {error}") from error
