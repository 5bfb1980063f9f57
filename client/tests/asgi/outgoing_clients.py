"""The HTTP clients that keyproxy_client authenticates, behind one interface for the tests."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx
import requests

from keyproxy_client import http


@dataclass(frozen=True)
class Result:
    """The last response."""

    status: int
    body: bytes

    @property
    def seen(self) -> Any:
        """The request, as the echo server saw it."""
        return json.loads(self.body)

    def seen_headers(self, name: str) -> list[str]:
        """The values of a header of the request at the echo server."""
        return [value for found, value in self.seen["headers"] if found.lower() == name.lower()]


@dataclass(frozen=True)
class Call:
    """One request. `body`: bytes, "file" or "generator"; the latter two send b"filegenerator"."""

    url: str
    method: str = "GET"
    body: bytes | str | None = None
    headers: dict[str, str] | None = None
    follows: bool = False


Client = Callable[[Call, dict[str, Any]], Result]

STREAMED = b"filegenerator"


def generated() -> Iterator[bytes]:
    """A body that can be read once."""
    yield STREAMED[:4]
    yield STREAMED[4:]


async def generated_async() -> AsyncIterator[bytes]:
    """The same for coroutines."""
    for part in generated():
        yield part


def with_httpx(call: Call, options: dict[str, Any]) -> Result:
    """By httpx.Client."""
    content = {"file": lambda: io.BytesIO(STREAMED), "generator": generated}.get(str(call.body), lambda: call.body)()
    with http.httpx_client(**options, follow_redirects=call.follows) as client:
        found = client.request(call.method, call.url, content=content, headers=call.headers)
    return Result(found.status_code, found.content)


def with_httpx_async(call: Call, options: dict[str, Any]) -> Result:
    """By httpx.AsyncClient."""

    async def sent() -> Result:
        content = generated_async() if call.body == "generator" else call.body
        async with http.httpx_async_client(**options, follow_redirects=call.follows) as client:
            found = await client.request(call.method, call.url, content=content, headers=call.headers)
            return Result(found.status_code, found.content)

    return asyncio.run(sent())


def with_requests(call: Call, options: dict[str, Any]) -> Result:
    """By a session of requests."""
    data = {"file": lambda: io.BytesIO(STREAMED), "generator": generated}.get(str(call.body), lambda: call.body)()
    with http.requests_session(**options) as session:
        found = session.request(
            call.method, call.url, data=data, headers=call.headers, allow_redirects=call.follows, timeout=10
        )
    return Result(found.status_code, found.content)


def with_requests_auth(call: Call, options: dict[str, Any]) -> Result:
    """By requests without a session of ours."""
    url = call.url if not call.url.startswith("/") else f"{options['origin']}{call.url}"
    with requests.request(
        call.method,
        url,
        data=generated() if call.body == "generator" else call.body,
        headers=call.headers,
        auth=http.KeyproxyAuth(**options),
        allow_redirects=call.follows,
        timeout=10,
    ) as found:
        return Result(found.status_code, found.content)


def with_httpx_auth(call: Call, options: dict[str, Any]) -> Result:
    """By httpx without a client of ours."""
    url = call.url if not call.url.startswith("/") else f"{options['origin']}{call.url}"
    content = generated() if call.body == "generator" else call.body
    found = httpx.request(
        call.method,
        url,
        content=content,
        headers=call.headers,
        auth=http.KeyproxyAuth(**options),
        follow_redirects=call.follows,
    )
    return Result(found.status_code, found.content)


def with_aiohttp(call: Call, options: dict[str, Any]) -> Result:
    """By a session of aiohttp."""

    async def sent() -> Result:
        url = call.url if not call.url.startswith("/") else f"{options['origin']}{call.url}"
        data = {"file": lambda: io.BytesIO(STREAMED), "generator": generated_async}.get(
            str(call.body), lambda: call.body
        )()
        middleware = http.keyproxy_middleware(**options)
        async with (
            aiohttp.ClientSession(middlewares=[middleware]) as session,
            session.request(call.method, url, data=data, headers=call.headers, allow_redirects=call.follows) as found,
        ):
            return Result(found.status, await found.read())

    return asyncio.run(sent())


CLIENTS: dict[str, Client] = {
    "httpx": with_httpx,
    "httpx-async": with_httpx_async,
    "requests": with_requests,
    "aiohttp": with_aiohttp,
}

#: With clients that are not keyproxy_client's.
AUTHS: dict[str, Client] = {"httpx-auth": with_httpx_auth, "requests-auth": with_requests_auth}
