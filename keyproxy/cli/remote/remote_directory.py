"""The operations of the directory, through a running `keyproxy admin`.

Results are those of the directory; see `http_transport` for refusals.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, Final
from urllib.parse import quote

import orjson

from keyproxy.admin.schemas.request_models import PAGE_MAX
from keyproxy.auth import key_scanner
from keyproxy.auth.api_key import SecretKey
from keyproxy.cli.remote.http_transport import HttpTransport
from keyproxy.store.directory.bulk import BATCH_MAX
from keyproxy.store.directory.directory import (
    AuditFilter,
    Entity,
    ImportedKey,
    ImportReport,
    Invalid,
    KeyFilter,
    KeyWish,
    Page,
    Revocation,
)
from keyproxy.store.directory.interface import AS_CONFIGURED_THERE

#: Size of the keys in a body, with room for the surrounding JSON.
_PART_BYTES_MAX: Final = 1_000_000


class RemoteDirectory(HttpTransport):
    """The directory over the admin API. Use it as a context manager."""

    def __init__(self, url: str, token: str) -> None:
        """`url`: http://host:port, https://host:port or unix:/path."""
        super().__init__(url, token)
        #: The cursor of a list's next page, by path and query and the last id of the previous page.
        self._cursors: dict[tuple[str, str], str | None] = {}
        self._export: AsyncIterator[Entity] | None = None

    # -- tenants and users

    async def create_tenant(self, tenant_id: str, name: str, plan: str | None = None) -> Entity:
        return await self.ask("POST", "/v1/tenants", {"id": tenant_id, "name": name, "plan": plan})

    async def tenant(self, tenant_id: str) -> Entity:
        return await self.ask("GET", _path("tenants", tenant_id))

    async def tenants(self, after: str, limit: int) -> list[Entity]:
        return await self._list("/v1/tenants", after, limit)

    async def change_tenant(self, tenant_id: str, changes: Mapping[str, Any]) -> Entity:
        return await self.ask("PATCH", _path("tenants", tenant_id), dict(changes))

    async def delete_tenant(self, tenant_id: str) -> Entity:
        return await self.ask("DELETE", _path("tenants", tenant_id))

    async def create_user(
        self, user_id: str, tenant_id: str, first_key: KeyWish | None, *, plan: str | None = None
    ) -> Entity:
        key = None if first_key is None else _wish(first_key)
        return await self.ask("POST", "/v1/users", {"id": user_id, "tenant": tenant_id, "plan": plan, "key": key})

    async def user(self, user_id: str) -> Entity:
        return await self.ask("GET", _path("users", user_id))

    async def users(self, after: str, limit: int, tenant_id: str | None) -> list[Entity]:
        return await self._list("/v1/users", after, limit, tenant=tenant_id)

    async def change_user(self, user_id: str, changes: Mapping[str, Any]) -> Entity:
        return await self.ask("PATCH", _path("users", user_id), dict(changes))

    async def delete_user(self, user_id: str) -> Entity:
        return await self.ask("DELETE", _path("users", user_id))

    # -- keys

    async def issue_key(self, user_id: str, wish: KeyWish) -> Entity:
        return await self.ask("POST", "/v1/keys", {"user": user_id, "is_test": wish.is_test, **_wish(wish)})

    async def issue_keys(self, wishes: Sequence[tuple[str, KeyWish]], *, reissue_unseen: bool = False) -> list[Entity]:
        keys = [{"user": user, "is_test": wish.is_test, **_wish(wish)} for user, wish in wishes]
        # An older admin API refuses unknown fields.
        chosen = {"reissue_unseen": True} if reissue_unseen else {}
        items: list[Entity] = (await self.ask("POST", "/v1/keys/issue", {"keys": keys, **chosen}))["items"]
        return items

    async def key(self, key_id: str) -> Entity:
        return await self.ask("GET", _path("keys", key_id))

    async def keys(self, after: str, limit: int, wanted: KeyFilter | None = None) -> list[Entity]:
        return await self._list("/v1/keys", after, limit, **_key_filter(wanted))

    async def keys_by_time(self, order: str, cursor: str | None, limit: int, wanted: KeyFilter | None = None) -> Page:
        return await self._page("/v1/keys", cursor, limit, sort=order, **_key_filter(wanted))

    async def change_key(self, key_id: str, changes: Mapping[str, Any]) -> Entity:
        return await self.ask("PATCH", _path("keys", key_id), dict(changes))

    async def rotate_key(self, key_id: str, *, grace: timedelta, expires_in: timedelta | None) -> Entity:
        body = {"grace_seconds": int(grace.total_seconds()), **_life(expires_in)}
        return await self.ask("POST", _path("keys", key_id, "/rotate"), body)

    async def revoke_key(self, key_id: str, reason: str) -> Entity:
        return await self.ask("POST", _path("keys", key_id, "/revoke"), {"reason": reason})

    async def report_leaked(self, digest: bytes, reason: str) -> Entity:
        return await self.ask("POST", "/v1/leaked-keys", {"digest": digest.hex(), "reason": reason})

    async def report_leaked_key(self, key: SecretKey, reason: str) -> Entity:
        plaintext = key.reveal().decode("latin-1")
        return await self.ask("POST", "/v1/leaked-keys", {"key": plaintext, "reason": reason})

    async def report_leaked_text(self, text: bytes, reason: str) -> Entity:
        return await self.ask("POST", "/v1/leaked-texts", {"text": _sent(text), "reason": reason})

    async def whose(self, text: bytes) -> Entity:
        return await self.ask("POST", "/v1/keys/whose", {"text": _sent(text)})

    async def delete_key(self, key_id: str) -> Entity:
        return await self.ask("DELETE", _path("keys", key_id))

    async def count_to_revoke(self, wanted: Revocation) -> int:
        told = await self.ask("POST", "/v1/keys/revoke", {**_revocation(wanted), "dry_run": True})
        remaining: int = told["remaining"]
        return remaining

    async def revoke_keys(self, wanted: Revocation, reason: str) -> AsyncGenerator[list[str], None]:
        while True:
            told = await self.ask("POST", "/v1/keys/revoke", {**_revocation(wanted), "reason": reason})
            if told["revoked"]:
                yield told["revoked"]
            if not told["revoked"] or not told["remaining"]:
                return

    async def import_keys(self, keys: Sequence[ImportedKey], *, dry_run: bool) -> ImportReport:
        """As Directory's, in parts that fit into a request; a dry run checks each part separately."""
        report, start = ImportReport(), 0
        for rows in _parts(keys):
            told = await self.ask("POST", "/v1/keys/import", {"keys": rows, "dry_run": dry_run})
            places = [key.place for key in keys[start : start + len(rows)]]
            problems = [(places[one["index"]], one["problem"]) for one in told["problems"]]
            report.add(ImportReport(told["imported"], told["present"], told["users"], problems))
            start += len(rows)
            if dry_run and start < len(keys):
                self.warnings["a dry run through the admin API checks each batch of 1,000 keys separately"] = None
        return report

    # -- plans and the audit log

    async def set_plan(self, name: str, limits: object) -> Entity:
        return await self.ask("PUT", _path("plans", name), {"limits": limits})

    async def change_plan(self, name: str, changes: Mapping[str, float | None]) -> Entity:
        return await self.ask("PATCH", _path("plans", name), {"limits": dict(changes)})

    async def plan(self, name: str) -> Entity:
        return await self.ask("GET", _path("plans", name))

    async def plans(self, after: str, limit: int) -> list[Entity]:
        return await self._list("/v1/plans", after, limit)

    async def delete_plan(self, name: str) -> Entity:
        return await self.ask("DELETE", _path("plans", name))

    async def audit(self, cursor: str | None, limit: int, wanted: AuditFilter | None = None) -> Page:
        return await self._page("/v1/audit", cursor, limit, **_audit_filter(wanted))

    async def audit_horizon(self) -> int:
        """The server determines the horizon when an export starts; a later export starts a new one."""
        self._export = None
        return 0

    async def audit_export(
        self, cursor: str | None, limit: int, wanted: AuditFilter | None = None, *, horizon: int
    ) -> Page:
        """Return the next part of the export that the first call after `audit_horizon` started."""
        del horizon
        if self._export is None:
            self._export = self.lines("/v1/audit/export", {**_audit_filter(wanted), "after": cursor or "0"})
        rows: list[Entity] = []
        while len(rows) < limit and (row := await anext(self._export, None)) is not None:
            rows.append(row)
        return Page(rows, str(rows[-1]["id"]) if len(rows) == limit > 0 else None)

    # -- shared

    async def _page(self, path: str, cursor: str | None, limit: int, **filters: str) -> Page:
        query = {**filters, "limit": str(min(limit, PAGE_MAX))} | ({} if cursor is None else {"cursor": cursor})
        told = await self.ask("GET", path, query=query)
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


def _sent(text: bytes) -> str:
    """Encode a text for JSON. Raises Invalid if it exceeds the search limit."""
    if len(text) > key_scanner.TEXT_BYTES_MAX:
        raise Invalid(key_scanner.TOO_LONG)
    return key_scanner.as_text(text)


def _parts(keys: Sequence[ImportedKey]) -> Iterator[list[Entity]]:
    """Yield keys in the admin API's format, in parts that fit into one request."""
    part: list[Entity] = []
    size = 0
    for key in keys:
        row = _imported(key)
        row_bytes = len(orjson.dumps(row)) + 1
        if part and (len(part) == BATCH_MAX or size + row_bytes > _PART_BYTES_MAX):
            yield part
            part, size = [], 0
        part.append(row)
        size += row_bytes
    if part:
        yield part


def _imported(key: ImportedKey) -> Entity:
    given = {
        "user": key.user, "tenant": key.tenant, "digest": key.digest, "prefix": key.prefix, "hashed_key": key.hashed,
        "id": key.id, "name": key.name, "hint": key.hint, "scopes": list(key.scopes), "is_test": key.is_test,
        "plan": key.plan, "created_at": key.created_at, "expires_at": key.expires_at, "revoked": key.is_revoked,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


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
