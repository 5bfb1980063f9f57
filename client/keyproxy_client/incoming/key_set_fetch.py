"""Fetches a JWKS by HTTP: no redirects, no proxies of the environment, and bounds on time and size."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import logging
import re
import socket
import ssl
import threading
import time
from typing import Any, Final
from urllib.parse import urlsplit

_log: Final = logging.getLogger("keyproxy_client.identity")

#: From the connection to the last byte.
FETCH_SECONDS_MAX: Final = 2.0
_BYTES_MAX: Final = 262_144
_CHUNK_BYTES: Final = 65_536

#: For a response without `max-age`, and the bounds of it.
_MAX_AGE_SECONDS: Final = 60.0
_MAX_AGE_SECONDS_MIN: Final = 1.0
_MAX_AGE_SECONDS_MAX: Final = 86_400.0
_MAX_AGE: Final = re.compile(r'(?:^|[\s,])max-age="?([0-9]{1,9})"?', re.IGNORECASE)
_NOT_CACHED: Final = re.compile(r"(?:^|[\s,])no-(?:store|cache)\b", re.IGNORECASE)


class FetchFailed(Exception):
    """The JWKS could not be fetched. Its text shows nothing of the response."""


class KeySetFetcher:
    """Fetches the JWKS at one URL."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for a URL that is not HTTP."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.fragment:
            raise ValueError("the JWKS URL must be like 'https://host/jwks.json'")
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("the JWKS URL must be of printable ASCII")
        #: For the log: without a query, which may have a secret.
        self.shown: Final = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self._host: Final = parts.hostname
        self._port: Final = parts.port
        self._path: Final = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._tls: Final = ssl.create_default_context() if parts.scheme == "https" else None
        if self._tls is None and not _is_loopback(self._host):
            _log.warning("the keys of keyproxy come from another host without TLS: they can be forged in transit")

    def fetch(self) -> tuple[Any, float]:
        """The JSON, and for how many seconds it may be cached. Raises FetchFailed."""
        deadline = time.monotonic() + FETCH_SECONDS_MAX
        try:
            connection = self._connection()
            connection.connect()
            # The timeout of the socket bounds each read, not their number.
            watchdog = threading.Timer(max(0.0, deadline - time.monotonic()), _shut_down, [connection.sock])
            watchdog.daemon = True
            watchdog.start()
            try:
                connection.request("GET", self._path, headers={"Accept": "application/jwk-set+json, application/json"})
                response = connection.getresponse()
                if response.status != http.client.OK:
                    raise FetchFailed(f"status {response.status}")
                body = _bounded_body(response, deadline)
                return json.loads(body), _max_age(response)
            finally:
                watchdog.cancel()
                connection.close()
        except OSError as error:
            raise FetchFailed(type(error).__name__) from error
        except http.client.HTTPException as error:
            raise FetchFailed(f"no HTTP response: {type(error).__name__}") from error
        except (ValueError, RecursionError) as error:
            raise FetchFailed("no JSON") from error

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=FETCH_SECONDS_MAX)
        return http.client.HTTPSConnection(self._host, self._port, timeout=FETCH_SECONDS_MAX, context=self._tls)


def _shut_down(connection: socket.socket) -> None:
    """End the reads of another thread."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bounded_body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    body = b""
    while chunk := response.read1(_CHUNK_BYTES):
        body += chunk
        if len(body) > _BYTES_MAX:
            raise FetchFailed(f"more than {_BYTES_MAX} bytes")
        if time.monotonic() > deadline:
            raise FetchFailed(f"no complete response within {FETCH_SECONDS_MAX} s")
    if response.length:
        raise FetchFailed("the response is incomplete")
    return body


def _max_age(response: http.client.HTTPResponse) -> float:
    control = response.headers.get("Cache-Control", "")
    if _NOT_CACHED.search(control):
        return _MAX_AGE_SECONDS_MIN
    found = _MAX_AGE.search(control)
    seconds = float(found[1]) if found else _MAX_AGE_SECONDS
    return min(max(seconds, _MAX_AGE_SECONDS_MIN), _MAX_AGE_SECONDS_MAX)
