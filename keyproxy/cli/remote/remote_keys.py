"""The operations on keys, through a running `keyproxy admin`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

import orjson

from keyproxy.auth import key_scanner
from keyproxy.auth.api_key import SecretKey
from keyproxy.cli.remote.admin_client import AdminClient, ListById, seconds
from keyproxy.store.directory.directory import (
    Entity,
    EntityPage,
    ImportedKey,
    ImportReport,
    Invalid,
    KeyFilter,
    KeyWish,
    Revocation,
)
from keyproxy.store.directory.entities import ACTS_FOR_NONE
from keyproxy.store.directory.interface import AS_CONFIGURED_THERE
from keyproxy.store.directory.key_batches import BATCH_MAX

#: Size of the keys in a body, with room for the surrounding JSON.
_PART_BYTES_MAX: Final = 1_000_000


class RemoteKeys:
    """KeyOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._list = ListById(client, "list_keys")

    async def issue(self, user_id: str, wish: KeyWish) -> Entity:
        return await self._client.call("issue_key", **_wish_fields(user_id, wish))

    async def get(self, key_id: str) -> Entity:
        return await self._client.call("show_key", key_id)

    async def list_by_id(self, after: str, limit: int, wanted: KeyFilter | None = None) -> list[Entity]:
        return await self._list.page(after, limit, **_filters(wanted))

    async def list_by_time(
        self, order: str, cursor: str | None, limit: int, wanted: KeyFilter | None = None
    ) -> EntityPage:
        return await self._client.page("list_keys", cursor=cursor, limit=limit, sort=order, **_filters(wanted))

    async def change(self, key_id: str, changes: Mapping[str, Any]) -> Entity:
        return await self._client.call("change_key", key_id, **changes)

    async def rotate(self, key_id: str, *, grace: timedelta, expires_in: timedelta | None) -> Entity:
        lifetime = _lifetime_fields(expires_in)
        return await self._client.call("rotate_key", key_id, grace_seconds=int(grace.total_seconds()), **lifetime)

    async def revoke(self, key_id: str, reason: str) -> Entity:
        return await self._client.call("revoke_key", key_id, reason=reason)

    async def suspend(self, key_id: str, reason: str) -> Entity:
        return await self._client.call("suspend_key", key_id, reason=reason)

    async def resume(self, key_id: str) -> Entity:
        return await self._client.call("resume_key", key_id)

    async def delete(self, key_id: str) -> Entity:
        return await self._client.call("delete_key", key_id)


class RemoteKeyBatches:
    """KeyBatchOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def issue(self, wishes: Sequence[tuple[str, KeyWish]], *, reissue_unseen: bool = False) -> list[Entity]:
        keys = [_wish_fields(user, wish) for user, wish in wishes]
        # An older admin API refuses unknown fields.
        reissue = {"reissue_unseen": True} if reissue_unseen else {}
        items: list[Entity] = (await self._client.call("issue_keys", keys=keys, **reissue))["items"]
        return items

    async def count_to_revoke(self, wanted: Revocation) -> int:
        remaining: int = (await self._client.call("revoke_keys", **_revocation(wanted), dry_run=True))["remaining"]
        return remaining

    async def revoke(self, wanted: Revocation, reason: str) -> AsyncGenerator[list[str], None]:
        while True:
            result = await self._client.call("revoke_keys", **_revocation(wanted), reason=reason)
            if result["revoked"]:
                yield result["revoked"]
            if not result["revoked"] or not result["remaining"]:
                return


class RemoteKeyImporter:
    """KeyImportOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def run(self, keys: Sequence[ImportedKey], *, dry_run: bool) -> ImportReport:
        """Import keys in parts that fit into a request; a dry run checks each part separately."""
        report, start = ImportReport(), 0
        for rows in _parts(keys):
            result = await self._client.call("import_keys", keys=rows, dry_run=dry_run)
            places = [key.place for key in keys[start : start + len(rows)]]
            problems = [(places[one["index"]], one["problem"]) for one in result["problems"]]
            report.add(ImportReport(result["imported"], result["present"], result["users"], problems))
            start += len(rows)
            if dry_run and start < len(keys):
                self._client.warn("a dry run through the admin API checks each batch of 1,000 keys separately")
        return report


class RemoteLeakedKeys:
    """LeakedKeyOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def report_digest(self, digest: bytes, reason: str) -> Entity:
        return await self._client.call("report_leaked_key", digest=digest.hex(), reason=reason)

    async def report_key(self, key: SecretKey, reason: str) -> Entity:
        plaintext = key.reveal().decode("latin-1")
        return await self._client.call("report_leaked_key", key=plaintext, reason=reason)

    async def report_text(self, text: bytes, reason: str) -> Entity:
        return await self._client.call("report_leaked_text", text=_json_text(text), reason=reason)

    async def find(self, text: bytes) -> Entity:
        return await self._client.call("find_keys", text=_json_text(text))


def key_fields(wish: KeyWish) -> dict[str, Any]:
    """The fields of a new key that do not depend on its user."""
    return {"name": wish.name, "scopes": list(wish.scopes), "plan": wish.plan, **_lifetime_fields(wish.expires_in)}


def _wish_fields(user_id: str, wish: KeyWish) -> dict[str, Any]:
    # An older admin API refuses unknown fields.
    newer: dict[str, Any] = {"roles": list(wish.roles)} if wish.roles else {}
    if wish.acts_for != ACTS_FOR_NONE:
        newer["acts_for"] = wish.acts_for
    return {"user": user_id, "is_test": wish.is_test, **key_fields(wish), **newer}


def _lifetime_fields(expires_in: timedelta | None) -> dict[str, int | None]:
    return {} if expires_in == AS_CONFIGURED_THERE else {"expires_in_seconds": seconds(expires_in)}


def _json_text(text: bytes) -> str:
    """Decode a text for JSON. Raises Invalid if it exceeds the search limit."""
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
    fields = {
        "user": key.user,
        "tenant": key.tenant,
        "digest": key.digest,
        "prefix": key.prefix,
        "hashed_key": key.hashed,
        "id": key.id,
        "name": key.name,
        "hint": key.hint,
        "scopes": list(key.scopes),
        "is_test": key.is_test,
        "plan": key.plan,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked": key.is_revoked,
    }
    # An older admin API refuses unknown fields.
    if key.roles:
        fields["roles"] = list(key.roles)
    if key.acts_for != ACTS_FOR_NONE:
        fields["acts_for"] = key.acts_for
    return {name: value for name, value in fields.items() if value is not None}


def _revocation(wanted: Revocation) -> dict[str, Any]:
    return {
        "user": wanted.user,
        "tenant": wanted.tenant,
        "older_than_seconds": seconds(wanted.older_than),
        "unused_seconds": seconds(wanted.unused_for),
    }


def _filters(wanted: KeyFilter | None) -> dict[str, Any]:
    wanted = wanted or KeyFilter()
    return {
        "user": wanted.user,
        "tenant": wanted.tenant,
        "state": wanted.state,
        "is_test": wanted.is_test,
        "older_than_seconds": seconds(wanted.older_than),
        "unused_seconds": seconds(wanted.unused_for),
        "expires_within_seconds": seconds(wanted.expires_within),
    }
