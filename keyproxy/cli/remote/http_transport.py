"""Asking a running `keyproxy admin`: one request at a time, and what is refused in the words of the directory.

What is refused raises what the directory would have raised. Nothing is sent a second time: an answer that was lost on its
way is told as such, and lists show what came of it.
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
    """The admin API does not let this token do it."""


class HttpTransport:
    """See the module. To be used as a context."""

    def __init__(self, url: str, token: str) -> None:
        """`url`: http://host:port, https://host:port or unix:/path."""
        connector = aiohttp.UnixConnector(url.removeprefix("unix:")) if url.startswith("unix:") else None
        self._session = aiohttp.ClientSession(
            base_url="http://admin" if connector is not None else url, connector=connector,
            headers={"Authorization": f"Bearer {token}"}, timeout=aiohttp.ClientTimeout(total=_SECONDS),
            read_bufsize=_LINE_BYTES_MAX,
        )  # fmt: skip
        #: What the server did all the same, such as a scope that no route asks for; each once.
        self.warnings: dict[str, None] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(
        self, method: str, path: str, content: object = None, query: Mapping[str, str] | None = None
    ) -> Entity:
        """The JSON of an answer. Raises DirectoryError or StoreUnavailable."""
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
        """The lines of an answer that goes on for as long as there is something. Raises as `ask`."""
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
        raise StoreUnavailable(f"the admin API does not answer: {error or type(error).__name__}") from error
    except ValueError as error:
        raise StoreUnavailable("the admin API answers with something that is not JSON: is it one?") from error


def _error(status: int, body: bytes) -> Exception:
    """What the directory would have raised."""
    try:
        problem = orjson.loads(body)
        code, detail = str(problem["code"]), str(problem["detail"])
        if problem.get("errors"):
            detail = "; ".join(f"{one['field']}: {one['detail']}" for one in problem["errors"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return StoreUnavailable(f"the admin API answers {status}: is it one?")
    sentence = f"{detail[:1].lower()}{detail[1:]}".removesuffix(".")
    if status >= 500:
        return StoreUnavailable(sentence)
    return _ERRORS.get(code, Denied)(sentence if code in _ERRORS else f"the admin API refuses: {sentence} ({code})")
