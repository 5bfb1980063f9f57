"""The admin API as its users see it: the operations of the directory, asked of a running `keyproxy admin`.

What comes back is what the directory would have answered, and what is refused raises what the directory would have
raised. Nothing is sent a second time: an answer that was lost on its way is told as such, and lists show what came of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, Final, Self
from urllib.parse import quote

import aiohttp
import orjson

from keyproxy.admin.accepted import PAGE_MAX
from keyproxy.keyformat import SecretKey
from keyproxy.store.database import StoreUnavailable
from keyproxy.store.directory import (
    AuditFilter,
    Conflict,
    DirectoryError,
    Entity,
    Invalid,
    KeyFilter,
    KeyWish,
    NotFound,
    Outdated,
    Page,
    Revocation,
)
from keyproxy.store.operations import AS_CONFIGURED_THERE

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


class AdminClient:
    """See the module. To be used as a context."""

    def __init__(self, url: str, token: str) -> None:
        """`url`: http://host:port, https://host:port or unix:/path."""
        connector = aiohttp.UnixConnector(url.removeprefix("unix:")) if url.startswith("unix:") else None
        self._session = aiohttp.ClientSession(
            base_url="http://admin" if connector is not None else url, connector=connector,
            headers={"Authorization": f"Bearer {token}"}, timeout=aiohttp.ClientTimeout(total=_SECONDS),
            read_bufsize=_LINE_BYTES_MAX,
        )  # fmt: skip
        #: Where a list by id goes on, by its path and query and the last id of the page before.
        self._cursors: dict[tuple[str, str], str | None] = {}
        self._export: AsyncIterator[Entity] | None = None
        #: What the server did all the same, such as a scope that no route asks for.
        self.warnings: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    # -- tenants and users

    async def create_tenant(self, tenant_id: str, name: str, plan: str | None = None) -> Entity:
        return await self._ask("POST", "/v1/tenants", {"id": tenant_id, "name": name, "plan": plan})

    async def tenant(self, tenant_id: str) -> Entity:
        return await self._ask("GET", _path("tenants", tenant_id))

    async def tenants(self, after: str, limit: int) -> list[Entity]:
        return await self._list("/v1/tenants", after, limit)

    async def change_tenant(self, tenant_id: str, changes: Mapping[str, Any]) -> Entity:
        return await self._ask("PATCH", _path("tenants", tenant_id), dict(changes))

    async def delete_tenant(self, tenant_id: str) -> Entity:
        return await self._ask("DELETE", _path("tenants", tenant_id))

    async def create_user(
        self, user_id: str, tenant_id: str, first_key: KeyWish | None, *, plan: str | None = None
    ) -> Entity:
        key = None if first_key is None else _wish(first_key)
        return await self._ask("POST", "/v1/users", {"id": user_id, "tenant": tenant_id, "plan": plan, "key": key})

    async def user(self, user_id: str) -> Entity:
        return await self._ask("GET", _path("users", user_id))

    async def users(self, after: str, limit: int, tenant_id: str | None) -> list[Entity]:
        return await self._list("/v1/users", after, limit, tenant=tenant_id)

    async def change_user(self, user_id: str, changes: Mapping[str, Any]) -> Entity:
        return await self._ask("PATCH", _path("users", user_id), dict(changes))

    async def delete_user(self, user_id: str) -> Entity:
        return await self._ask("DELETE", _path("users", user_id))

    # -- keys

    async def issue_key(self, user_id: str, wish: KeyWish) -> Entity:
        return await self._ask("POST", "/v1/keys", {"user": user_id, "is_test": wish.is_test, **_wish(wish)})

    async def issue_keys(self, wishes: Sequence[tuple[str, KeyWish]]) -> list[Entity]:
        keys = [{"user": user, "is_test": wish.is_test, **_wish(wish)} for user, wish in wishes]
        items: list[Entity] = (await self._ask("POST", "/v1/keys/issue", {"keys": keys}))["items"]
        return items

    async def key(self, key_id: str) -> Entity:
        return await self._ask("GET", _path("keys", key_id))

    async def keys(self, after: str, limit: int, wanted: KeyFilter | None = None) -> list[Entity]:
        return await self._list("/v1/keys", after, limit, **_key_filter(wanted))

    async def keys_by_time(self, order: str, cursor: str | None, limit: int, wanted: KeyFilter | None = None) -> Page:
        return await self._page("/v1/keys", cursor, limit, sort=order, **_key_filter(wanted))

    async def change_key(self, key_id: str, changes: Mapping[str, Any]) -> Entity:
        return await self._ask("PATCH", _path("keys", key_id), dict(changes))

    async def rotate_key(self, key_id: str, *, grace: timedelta, expires_in: timedelta | None) -> Entity:
        body = {"grace_seconds": int(grace.total_seconds()), **_life(expires_in)}
        return await self._ask("POST", _path("keys", key_id, "/rotate"), body)

    async def revoke_key(self, key_id: str, reason: str) -> Entity:
        return await self._ask("POST", _path("keys", key_id, "/revoke"), {"reason": reason})

    async def report_leaked(self, digest: bytes, reason: str) -> Entity:
        return await self._ask("POST", "/v1/leaked-keys", {"digest": digest.hex(), "reason": reason})

    async def report_leaked_key(self, key: SecretKey, reason: str) -> Entity:
        plaintext = key.reveal().decode("latin-1")
        return await self._ask("POST", "/v1/leaked-keys", {"key": plaintext, "reason": reason})

    async def delete_key(self, key_id: str) -> Entity:
        return await self._ask("DELETE", _path("keys", key_id))

    async def count_to_revoke(self, wanted: Revocation) -> int:
        told = await self._ask("POST", "/v1/keys/revoke", {**_revocation(wanted), "dry_run": True})
        remaining: int = told["remaining"]
        return remaining

    async def revoke_keys(self, wanted: Revocation, reason: str) -> AsyncGenerator[list[str], None]:
        while True:
            told = await self._ask("POST", "/v1/keys/revoke", {**_revocation(wanted), "reason": reason})
            if told["revoked"]:
                yield told["revoked"]
            if not told["revoked"] or not told["remaining"]:
                return

    # -- plans and the audit log

    async def set_plan(self, name: str, limits: object) -> Entity:
        return await self._ask("PUT", _path("plans", name), {"limits": limits})

    async def plan(self, name: str) -> Entity:
        return await self._ask("GET", _path("plans", name))

    async def plans(self, after: str, limit: int) -> list[Entity]:
        return await self._list("/v1/plans", after, limit)

    async def delete_plan(self, name: str) -> Entity:
        return await self._ask("DELETE", _path("plans", name))

    async def audit(self, cursor: str | None, limit: int, wanted: AuditFilter | None = None) -> Page:
        return await self._page("/v1/audit", cursor, limit, **_audit_filter(wanted))

    async def audit_horizon(self) -> int:
        """The server finds it when an export begins; a later export begins anew."""
        self._export = None
        return 0

    async def audit_export(
        self, cursor: str | None, limit: int, wanted: AuditFilter | None = None, *, horizon: int
    ) -> Page:
        """The next part of one export, which began with the first call after `audit_horizon`."""
        del horizon
        if self._export is None:
            self._export = self._exported({**_audit_filter(wanted), "after": cursor or "0"})
        rows: list[Entity] = []
        while len(rows) < limit and (row := await anext(self._export, None)) is not None:
            rows.append(row)
        return Page(rows, str(rows[-1]["id"]) if len(rows) == limit > 0 else None)

    # -- what they share

    async def _exported(self, query: Mapping[str, str]) -> AsyncIterator[Entity]:
        timeout = aiohttp.ClientTimeout(total=_EXPORT_SECONDS, sock_read=_SECONDS)
        with _told_in_the_words_of_the_store():
            async with self._session.get("/v1/audit/export", params=query, timeout=timeout) as response:
                if response.status != 200:
                    raise _error(response.status, await response.read())
                async for line in response.content:
                    yield orjson.loads(line)

    async def _ask(
        self, method: str, path: str, content: object = None, query: Mapping[str, str] | None = None
    ) -> Entity:
        data = None if content is None else io.BytesIO(orjson.dumps(content))
        headers = {} if data is None else {"Content-Type": "application/json"}
        with _told_in_the_words_of_the_store():
            async with self._session.request(method, path, data=data, headers=headers, params=query) as response:
                body = await response.read()
                if not 200 <= response.status < 300:
                    raise _error(response.status, body)
                answer: Entity = orjson.loads(body)
        self.warnings += answer.pop("warnings", [])
        return answer

    async def _page(self, path: str, cursor: str | None, limit: int, **filters: str) -> Page:
        query = {**filters, "limit": str(min(limit, PAGE_MAX))} | ({} if cursor is None else {"cursor": cursor})
        told = await self._ask("GET", path, query=query)
        return Page(told["items"], told["next"])

    async def _list(self, path: str, after: str, limit: int, **filters: str | None) -> list[Entity]:
        given = {name: value for name, value in filters.items() if value is not None}
        this = f"{path} {sorted(given.items())}"
        cursor = self._cursors.pop((this, after), None) if after else None
        if after and cursor is None:
            return []
        page = await self._page(path, cursor, limit, **given)
        if page.items:
            self._cursors[this, page.items[-1]["id"]] = page.next
        return page.items


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
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return StoreUnavailable(f"the admin API answers {status}: is it one?")
    sentence = f"{detail[:1].lower()}{detail[1:]}".removesuffix(".")
    if status >= 500:
        return StoreUnavailable(sentence)
    return _ERRORS.get(code, Denied)(sentence if code in _ERRORS else f"the admin API refuses: {sentence} ({code})")


def _path(kind: str, name: str, act: str = "") -> str:
    return f"/v1/{kind}/{quote(name, safe='')}{act}"


def _seconds(span: timedelta | None) -> int | None:
    return None if span is None else max(1, int(span.total_seconds()))


def _wish(wish: KeyWish) -> dict[str, Any]:
    return {
        "name": wish.name, "scopes": list(wish.scopes), "plan": wish.plan, **_life(wish.expires_in),
    }  # fmt: skip


def _life(life: timedelta | None) -> dict[str, int | None]:
    return {} if life == AS_CONFIGURED_THERE else {"expires_in_seconds": _seconds(life)}


def _revocation(wanted: Revocation) -> dict[str, Any]:
    return {
        "user": wanted.user, "tenant": wanted.tenant, "older_than_seconds": _seconds(wanted.older_than),
        "unused_seconds": _seconds(wanted.unused_for),
    }  # fmt: skip


def _key_filter(wanted: KeyFilter | None) -> dict[str, str]:
    wanted = wanted or KeyFilter()
    given: dict[str, object] = {
        "user": wanted.user, "tenant": wanted.tenant, "state": wanted.state,
        "is_test": None if wanted.is_test is None else str(wanted.is_test).lower(),
        "older_than_seconds": _seconds(wanted.older_than), "unused_seconds": _seconds(wanted.unused_for),
        "expires_within_seconds": _seconds(wanted.expires_within),
    }  # fmt: skip
    return {name: str(value) for name, value in given.items() if value is not None}


def _audit_filter(wanted: AuditFilter | None) -> dict[str, str]:
    return {
        name: value.isoformat() if isinstance(value, datetime) else str(value)
        for name, value in asdict(wanted or AuditFilter()).items()
        if value is not None
    }
