"""A client of keyproxy's admin API on the standard library: one request per connection, within one time limit."""

from __future__ import annotations

import functools
import http.client
import json
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from django.views.decorators.debug import sensitive_variables

from keyproxy_client.django.directory.errors import (
    DirectoryError,
    DirectoryRefused,
    DirectoryUnavailable,
    NotInDirectory,
)

_UNIX: Final = "unix:"
_BODY_BYTES_MAX: Final = 16 * 1024 * 1024
_CHUNK_BYTES: Final = 64 * 1024

#: Refusals that are no verdict on the request: it can be repeated as it is.
_TEMPORARY: Final = frozenset({"idempotency_in_progress", "too_many_failures", "request_timeout"})


class Content(dict[str, Any]):
    """A JSON object of a response. A member that is missing means that the server is not keyproxy's admin API."""

    def __missing__(self, member: str) -> Any:
        raise DirectoryUnavailable(f"the response of the admin API has no member {member!r}")

    def __repr__(self) -> str:
        # It may have a secret.
        return f"Content({', '.join(self)})"


@dataclass(frozen=True, slots=True)
class Response:
    """A successful response. `is_replayed`: it is the stored one of an earlier request with the same Idempotency-Key."""

    status: int
    content: Content
    is_replayed: bool = False


@dataclass(frozen=True, slots=True)
class AdminApi:
    """`keyproxy admin` at a URL: http://host:port, https://host:port or unix:/path. The token is read for each request.

    `timeout_seconds` limits a request from connecting to the last byte of its response.
    """

    url: str
    token_file: str
    timeout_seconds: float

    @sensitive_variables()
    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, object] | None = None,
        idempotency_key: str = "",
    ) -> Response:
        """Send one request and return its response. Raises DirectoryError and its kinds."""
        headers = {"Authorization": f"Bearer {self._token()}", "Accept": "application/json"}
        if idempotency_key:
            headers["Idempotency-Key"] = idempotency_key
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        target = self._prefix() + (f"{path}?{urlencode(query)}" if query else path)
        deadline = time.monotonic() + self.timeout_seconds
        connection = self._connection()
        try:
            connection.connect()
            _limit(connection, deadline)
            connection.request(method, target, body=data, headers=headers)
            _limit(connection, deadline)
            response = connection.getresponse()
            content = _content(_read(connection, response, deadline))
        except (OSError, http.client.HTTPException) as error:
            reason = f"the admin API at {self.url} did not respond: {type(error).__name__}"
            raise DirectoryUnavailable(reason) from error
        finally:
            connection.close()
        if 200 <= response.status < 300 and content is not None:
            return Response(response.status, content, response.getheader("Idempotency-Replayed") == "true")
        raise _error(response.status, content or Content())

    @sensitive_variables()
    def _token(self) -> str:
        try:
            token = Path(self.token_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DirectoryUnavailable(f"cannot read ADMIN_TOKEN_FILE {self.token_file}") from error
        if not token.isprintable() or not token:
            raise DirectoryUnavailable(f"ADMIN_TOKEN_FILE {self.token_file} does not contain one token")
        return token

    def _prefix(self) -> str:
        """The path of the URL, where another server forwards a part of its paths to the admin API."""
        return "" if self.url.startswith(_UNIX) else urlsplit(self.url).path.rstrip("/")

    def _connection(self) -> http.client.HTTPConnection:
        if self.url.startswith(_UNIX):
            return _UnixConnection(self.url.removeprefix(_UNIX), self.timeout_seconds)
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if parts.scheme == "https":
            return http.client.HTTPSConnection(host, parts.port, timeout=self.timeout_seconds, context=_tls())
        return http.client.HTTPConnection(host, parts.port, timeout=self.timeout_seconds)


def segment(value: str) -> str:
    """A value as one segment of a path."""
    return quote(value, safe="")


@functools.lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Loading the certificate authorities takes longer than a request."""
    return ssl.create_default_context()


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _limit(connection: http.client.HTTPConnection, deadline: float) -> None:
    """Limit the next operation of a connection to the time that is left. Raises TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    if connection.sock is not None:
        connection.sock.settimeout(left)


def _read(connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body. The time limit of a socket applies to each read: a server that sends slowly would have no limit."""
    received = bytearray()
    while True:
        _limit(connection, deadline)
        chunk = response.read1(_CHUNK_BYTES)
        if not chunk:
            if response.length:
                raise http.client.IncompleteRead(bytes(received), response.length)
            return bytes(received)
        received += chunk
        if len(received) > _BODY_BYTES_MAX:
            raise http.client.HTTPException("the response is too large")


def _content(body: bytes) -> Content | None:
    try:
        content = json.loads(body, object_hook=Content)
    except ValueError:
        return None
    return content if isinstance(content, Content) else None


def _error(status: int, problem: Mapping[str, Any]) -> DirectoryError:
    """The error for a response that is not successful. One without a code is another server's or a proxy's."""
    code = str(problem.get("code", ""))
    text = f"the admin API responded with {status}"
    if code:
        text = f"{text} {code}: {problem.get('detail', '')}"[:400]
    if status >= 500 or status == 429 or not code or code in _TEMPORARY:
        return DirectoryUnavailable(text, code=code)
    if code == "not_found":
        return NotInDirectory(text)
    return DirectoryRefused(text, code=code)
