"""HTTP client for a running `keyproxy admin`: one request at a time.

A refusal raises the exception that the directory raises for it. Requests are not retried: a lost response is an error,
and lists show whether the change was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Final, Self

import aiohttp
import orjson

from keyproxy.store.directory.directory import Conflict, DirectoryError, Entity, Invalid, NotFound, Outdated
from keyproxy.store.postgres.database import StoreUnavailable

_SECONDS: Final = 60.0
_EXPORT_SECONDS: Final = 3600.0
_LINE_BYTES_MAX: Final = 1 << 20

_ERRORS: Final[dict[str, type[DirectoryError]]] = {
    "not_found": NotFound,
    "conflict": Conflict,
    "invalid": Invalid,
    "outdated": Outdated,
}


class Denied(DirectoryError):
    """The token lacks permission for this operation."""


class HttpTransport:
    """An HTTP client for the admin API. Use it as a context manager."""

    def __init__(self, url: str, token: str) -> None:
        """`url`: http://host:port, https://host:port or unix:/path."""
        connector = aiohttp.UnixConnector(url.removeprefix("unix:")) if url.startswith("unix:") else None
        self._session = aiohttp.ClientSession(
            base_url="http://admin" if connector is not None else url, connector=connector,
            headers={"Authorization": f"Bearer {token}"}, timeout=aiohttp.ClientTimeout(total=_SECONDS),
            read_bufsize=_LINE_BYTES_MAX,
        )  # fmt: skip
        #: Warnings of the server, such as a scope that no route requires; without duplicates.
        self.warnings: dict[str, None] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(
        self, method: str, path: str, content: object = None, query: Mapping[str, str] | None = None
    ) -> Entity:
        """Send a request and return the response's JSON. Raises DirectoryError or StoreUnavailable."""
        data = None if content is None else io.BytesIO(orjson.dumps(content))
        headers = {} if data is None else {"Content-Type": "application/json"}
        with _told_in_the_words_of_the_store():
            async with self._session.request(
                method, path, data=data, headers=headers, params=query, allow_redirects=False
            ) as response:
                body = await response.read()
                if not 200 <= response.status < 300:
                    raise _error(response.status, body)
                answer: Entity = orjson.loads(body)
        self.warnings |= dict.fromkeys(answer.pop("warnings", []))
        return answer

    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Entity]:
        """Yield the lines of a streamed response. Raises as `ask`."""
        timeout = aiohttp.ClientTimeout(total=_EXPORT_SECONDS, sock_read=_SECONDS)
        with _told_in_the_words_of_the_store():
            async with self._session.get(path, params=query, timeout=timeout, allow_redirects=False) as response:
                if response.status != 200:
                    raise _error(response.status, await response.read())
                async for line in response.content:
                    yield orjson.loads(line)


@contextlib.contextmanager
def _told_in_the_words_of_the_store() -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, OSError) as error:
        raise StoreUnavailable(f"the admin API does not respond: {error or type(error).__name__}") from error
    except ValueError as error:
        raise StoreUnavailable("the response is not JSON: check that --admin-url is a keyproxy admin API") from error


def _error(status: int, body: bytes) -> Exception:
    """Return the exception that the directory raises for this refusal."""
    try:
        problem = orjson.loads(body)
        code, detail = str(problem["code"]), str(problem["detail"])
        if problem.get("errors"):
            detail = "; ".join(f"{one['field']}: {one['detail']}" for one in problem["errors"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return StoreUnavailable(
            f"the response has status {status} and no error code: check that --admin-url is a keyproxy admin API"
        )
    sentence = f"{detail[:1].lower()}{detail[1:]}".removesuffix(".")
    if status >= 500:
        return StoreUnavailable(sentence)
    return _ERRORS.get(code, Denied)(
        sentence if code in _ERRORS else f"the admin API refused the request: {sentence} ({code})"
    )
