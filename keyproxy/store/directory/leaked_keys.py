"""Look keys up by pasted text, a hint, an id or a name; revoke keys that have leaked."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from keyproxy.auth import key_scanner
from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.key_scanner import Scan
from keyproxy.model import KeyDigest
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ENTITIES, Entity
from keyproxy.store.directory.errors import Invalid, NotFound
from keyproxy.store.identities import drf_api_keys
from keyproxy.store.postgres.database import Row

#: How many keys `find` lists.
MATCHES_MAX: Final = 500

_NAME_CHARACTERS_MAX: Final = 200
_BATCH: Final = 10_000

#: Of a hint, in characters: less than this matches by chance.
_HINT_CHARACTERS_MIN: Final = 4

#: How many words are tried as imported keys that have never been used; each may take a second.
_HASHES_MAX: Final = 100

_UNKNOWN: Final[Entity] = {"known": False, "revoked_now": False, "user": None, "tenant": None, "key": None}


@dataclass(frozen=True, slots=True)
class LeakedKeys:
    """The lookup and revocation of leaked keys."""

    _context: DirectoryContext

    async def report_digest(self, digest: bytes, reason: str) -> Entity:
        """Revoke the leaked key with this SHA-256 digest (32 bytes), and return its owner.

        `known`: whether there is such a key. `revoked_now`: whether this call revoked it.
        """
        if len(digest) != 32:
            raise Invalid("the digest of a key must have 32 bytes (64 hexadecimal digits)")
        return await self._revoke(await self._context.fetch_row("key_of_digest", digest), reason)

    async def report_key(self, key: SecretKey, reason: str) -> Entity:
        """As `report_digest`, for a key in plaintext: an imported key may not have its digest stored yet."""
        row = await self._context.fetch_row("key_of_digest", key.digest())
        prefix = drf_api_keys.prefix_of(key)
        if row is None and prefix is not None:
            recipe = await self._context.fetch_row("foreign_recipe", prefix)
            shown = None if recipe is None else await asyncio.to_thread(drf_api_keys.hashed, key, recipe["recipe"])
            row = None if shown is None else await self._context.fetch_row("key_of_foreign", prefix, shown)
        return await self._revoke(row, reason)

    async def _revoke(self, row: Row | None, reason: str) -> Entity:
        if row is None:
            return dict(_UNKNOWN)
        try:
            async with self._context.transaction() as transaction:
                before = await self._context.lock(transaction, "key", row["id"])
                await transaction.fetch("revoke_key", row["id"], reason)
        except NotFound:
            # Deleted meanwhile, or another tenant's: this directory cannot see the key.
            return dict(_UNKNOWN)
        key = await self._context.get("key", row["id"])
        return {
            "known": True,
            "revoked_now": before["revoked_at"] is None,
            "user": key["user"],
            "tenant": key["tenant"],
            "key": key,
        }

    async def report_text(self, text: bytes, reason: str) -> Entity:
        """Revoke every key in a text, in any notation. Raises Invalid if the text is too long.

        `found`: the keys (`key`, `user`, `tenant`, `revoked_now`). `incomplete`: the number of truncated keys.
        `unknown`: the number of keys that are not in this store.
        """
        scan = await self._scan(text)
        ids, unknown = await self._matched(scan)
        async with self._context.transaction() as transaction:
            rows = await transaction.fetch("revoke_leaked", ids, reason, self._context.tenant_id)
            revoked = {row["id"] for row in rows}
            shown = [await transaction.fetch_row("key", key_id) for key_id in ids]
        found = [ENTITIES["key"](row) for row in shown if row is not None]
        return {
            "found": [
                {"key": key["id"], "user": key["user"], "tenant": key["tenant"], "revoked_now": key["id"] in revoked}
                for key in found
            ],
            "incomplete": scan.incomplete,
            "unknown": unknown,
        }

    async def find(self, text: bytes) -> Entity:
        """`keys`: the keys in a text; if it has none, the keys with this id, hint or name. Changes nothing.

        A part of a key is sufficient if it includes what the hint includes. Raises Invalid if the text is too long.
        """
        ids, _ = await self._matched(await self._scan(text))
        name = key_scanner.as_text(text).strip()
        if not ids and name and len(name) <= _NAME_CHARACTERS_MAX and name.isprintable():
            start, end = self._hint_of(name)
            rows = await self._context.fetch("keys_matching", name, start, end, self._context.tenant_id, MATCHES_MAX)
            ids = [row["id"] for row in rows]
        shown = [await self._context.fetch_row("key", key_id) for key_id in ids]
        return {"keys": [ENTITIES["key"](row) for row in shown if row is not None]}

    async def _scan(self, text: bytes) -> Scan:
        try:
            # In a thread: a long text takes a while, and must not block the event loop.
            return await asyncio.to_thread(key_scanner.scan, text, self._context.key_format)
        except ValueError as error:
            raise Invalid(str(error)) from error

    async def _matched(self, scan: Scan) -> tuple[list[str], int]:
        """Return the ids of the keys in the text, and the number of keys in it that this store does not have."""
        secrets = {secret.digest(): secret for secret in (*scan.keys, *scan.foreign)}
        digests = dict.fromkeys((*secrets, *map(KeyDigest, scan.digests)))
        ids = await self._ids_of(list(digests))
        candidates = [secret for digest, secret in secrets.items() if digest not in ids]
        ids |= await self._never_used(candidates)
        meant = {secret.digest() for secret in (*scan.keys, *scan.presented)}
        if not secrets and len(scan.digests) == 1:
            meant |= set(digests)
        return list(dict.fromkeys(ids.values())), scan.admin_tokens + sum(digest not in ids for digest in meant)

    async def _ids_of(self, digests: list[KeyDigest]) -> dict[KeyDigest, str]:
        ids: dict[KeyDigest, str] = {}
        for start in range(0, len(digests), _BATCH):
            rows = await self._context.fetch(
                "keys_of_digests", digests[start : start + _BATCH], self._context.tenant_id
            )
            ids |= {KeyDigest(row["digest"]): row["id"] for row in rows}
        return ids

    async def _never_used(self, candidates: list[SecretKey]) -> dict[KeyDigest, str]:
        """Match imported keys that have no digest yet, by computing the hash of the other program."""
        by_prefix = [
            (prefix, secret) for secret in candidates if (prefix := drf_api_keys.prefix_of(secret)) is not None
        ]
        prefixes = list(dict.fromkeys(prefix for prefix, _ in by_prefix))
        if not prefixes:
            return {}
        known = {
            row["prefix"] for row in await self._context.fetch("foreign_prefixes", prefixes, self._context.tenant_id)
        }
        tried = [(prefix, secret) for prefix, secret in by_prefix if prefix in known]
        if len(tried) > _HASHES_MAX:
            raise Invalid(
                f"more than {_HASHES_MAX} words may be imported keys that were never used: send fewer at once"
            )
        ids: dict[KeyDigest, str] = {}
        for prefix, secret in tried:
            recipe = await self._context.fetch_row("foreign_recipe", prefix)
            shown = None if recipe is None else await asyncio.to_thread(drf_api_keys.hashed, secret, recipe["recipe"])
            row = None if shown is None else await self._context.fetch_row("key_of_foreign", prefix, shown)
            if row is not None:
                ids[secret.digest()] = row["id"]
        return ids

    def _hint_of(self, name: str) -> tuple[str, str]:
        """The start and end of a hint, if `name` is a hint or part of a key; otherwise empty."""
        for mark in ("…", "..."):
            start, found, end = name.partition(mark)
            if found:
                return (start, end) if len(start) + len(end) >= _HINT_CHARACTERS_MIN else ("", "")
        return self._context.key_format.hint_start(name), ""
