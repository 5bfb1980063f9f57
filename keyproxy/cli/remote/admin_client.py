"""HTTP client for a running `keyproxy admin`: one request at a time.

A refusal raises the exception that the directory raises for it. Requests are not retried: a lost response is an error,
and lists show whether the change was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Final, Self

import aiohttp
import orjson

from keyproxy.admin.endpoint_table import ADDRESSES, PAGE_MAX
from keyproxy.cli.output import AdminApiUnavailable
from keyproxy.store.directory.directory import (
    Conflict,
    DelegationRefused,
    DirectoryError,
    Entity,
    EntityPage,
    Invalid,
    NotFound,
    Outdated,
    TooManyTokens,
)

_SECONDS: Final = 60.0
_EXPORT_SECONDS: Final = 3600.0
_LINE_BYTES_MAX: Final = 1 << 20

_ERRORS: Final[dict[str, type[DirectoryError]]] = {
    "not_found": NotFound,
    "conflict": Conflict,
    "invalid": Invalid,
    "outdated": Outdated,
    "delegation_refused": DelegationRefused,
    "quota_exhausted": TooManyTokens,
}


class Denied(DirectoryError):
    """The token lacks permission for this operation."""


class AdminClient:
    """A client for the admin API, driven by the table of its endpoints. Use it as a context manager."""

    def __init__(self, url: str, token: str) -> None:
        """`url`: http://host:port, https://host:port or unix:/path."""
        connector = aiohttp.UnixConnector(url.removeprefix("unix:")) if url.startswith("unix:") else None
        self._session = aiohttp.ClientSession(
            base_url="http://admin" if connector is not None else url,
            connector=connector,
            headers={"Authorization": f"Bearer {token}"},
            timeout=aiohttp.ClientTimeout(total=_SECONDS),
            read_bufsize=_LINE_BYTES_MAX,
        )
        #: Warnings of the server, such as a scope that no route requires; without duplicates.
        self.warnings: dict[str, None] = {}
        #: The label of money in the last result with amounts.
        self.money_unit = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def warn(self, warning: str) -> None:
        """Add a warning."""
        self.warnings[warning] = None

    async def call(self, endpoint: str, /, *path: str, **fields: Any) -> Entity:
        """Call an endpoint of ADDRESSES and return the response's JSON. Raises DirectoryError or AdminApiUnavailable.

        `path`: the values of the path's placeholders. `fields`: of the body; or of the query, where None means no such
        field.
        """
        address = ADDRESSES[endpoint]
        data = io.BytesIO(orjson.dumps(fields)) if address.has_body else None
        headers = {} if data is None else {"Content-Type": "application/json"}
        query = None if address.has_body else _query(fields)
        with _translated_errors():
            async with self._session.request(
                address.method,
                address.path_of(*path),
                data=data,
                headers=headers,
                params=query,
                allow_redirects=False,
            ) as response:
                body = await response.read()
                if not 200 <= response.status < 300:
                    raise _error(response.status, body)
                content: Entity = orjson.loads(body)
        self.warnings |= dict.fromkeys(content.pop("warnings", []))
        self.money_unit = content.pop("money_unit", self.money_unit)
        return content

    async def lines(self, endpoint: str, /, **fields: Any) -> AsyncIterator[Entity]:
        """Yield the lines of a streamed response. Raises as `call`."""
        timeout = aiohttp.ClientTimeout(total=_EXPORT_SECONDS, sock_read=_SECONDS)
        path, query = ADDRESSES[endpoint].path, _query(fields)
        with _translated_errors():
            async with self._session.get(path, params=query, timeout=timeout, allow_redirects=False) as response:
                if response.status != 200:
                    raise _error(response.status, await response.read())
                async for line in response.content:
                    yield orjson.loads(line)

    async def page(self, endpoint: str, /, *path: str, cursor: str | None, limit: int, **filters: Any) -> EntityPage:
        """Return one page of a list. `path`: as for `call`."""
        content = await self.call(endpoint, *path, limit=min(limit, PAGE_MAX), cursor=cursor, **filters)
        return EntityPage(content["items"], content["next"])


class ListById:
    """A list ordered by id. It keeps the API's cursors, because callers continue from the last id of a page."""

    def __init__(self, client: AdminClient, endpoint: str, *path: str) -> None:
        self._client = client
        self._endpoint = endpoint
        self._path = path
        #: The cursor of the next page, by the filters and the last id of the previous page.
        self._cursors: dict[tuple[str, str], str | None] = {}

    async def page(self, after: str, limit: int, **filters: Any) -> list[Entity]:
        """Return the items after the last id of the previous page; empty `after`: the first ones."""
        selection = repr(sorted(_query(filters).items()))
        cursor = self._cursors.pop((selection, after), None) if after else None
        if after and cursor is None:
            return []
        page = await self._client.page(self._endpoint, *self._path, cursor=cursor, limit=limit, **filters)
        if page.items:
            self._cursors[selection, page.items[-1]["id"]] = page.next
        return page.items


def seconds(span: timedelta | None) -> int | None:
    """A duration as the API accepts it."""
    return None if span is None else max(1, int(span.total_seconds()))


def _query(fields: Mapping[str, Any]) -> dict[str, str | list[str]]:
    return {
        name: [*map(_query_text, value)] if isinstance(value, list) else _query_text(value)
        for name, value in fields.items()
        if value is not None
    }


def _query_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value.isoformat() if isinstance(value, datetime) else str(value)


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, OSError) as error:
        raise AdminApiUnavailable(f"the admin API does not respond: {error or type(error).__name__}") from error
    except ValueError as error:
        raise AdminApiUnavailable("the response is not JSON: check that --admin-url is a keyproxy admin API") from error


def _error(status: int, body: bytes) -> Exception:
    """Return the exception that the directory raises for this refusal."""
    try:
        problem = orjson.loads(body)
        code, detail = str(problem["code"]), str(problem["detail"])
        if problem.get("errors"):
            detail = "; ".join(f"{one['field']}: {one['detail']}" for one in problem["errors"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return AdminApiUnavailable(
            f"the response has status {status} and no error code: check that --admin-url is a keyproxy admin API"
        )
    sentence = f"{detail[:1].lower()}{detail[1:]}".removesuffix(".")
    if status >= 500:
        return AdminApiUnavailable(sentence)
    return _ERRORS.get(code, Denied)(
        sentence if code in _ERRORS else f"the admin API refused the request: {sentence} ({code})"
    )
