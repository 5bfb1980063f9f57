"""Look keys up by pasted text, a hint, an id or a name; revoke keys that have leaked."""

from __future__ import annotations

import asyncio
from typing import Final

from keyproxy.auth import key_scanner
from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.key_scanner import Scan
from keyproxy.model import KeyDigest
from keyproxy.store.directory.base import ENTITIES, DirectoryBase, Entity, Invalid
from keyproxy.store.identities import drf_api_keys

#: How many keys `whose` lists.
MATCHES_MAX: Final = 500

_NAME_CHARACTERS_MAX: Final = 200
_BATCH: Final = 10_000

#: Of a hint, in characters: less than this matches by chance.
_HINT_CHARACTERS_MIN: Final = 4

#: How many words are tried as imported keys that have never been used; each may take a second.
_HASHES_MAX: Final = 100


class Leaks(DirectoryBase):
    """The lookup and revocation of leaked keys."""

    async def report_leaked_text(self, text: bytes, reason: str) -> Entity:
        """Revoke every key in a text, in any notation. Raises Invalid if the text is too long.

        `found`: the keys (`key`, `user`, `tenant`, `revoked_now`). `incomplete`: the number of truncated keys.
        `unknown`: the number of keys that are not in this store.
        """
        scan = await self._scan(text)
        ids, unknown = await self._matched(scan)
        async with self._acting() as transaction:
            rows = await transaction.fetch("revoke_leaked", ids, reason, self._bound_to)
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

    async def whose(self, text: bytes) -> Entity:
        """`keys`: the keys in a text; if it has none, the keys with this id, hint or name. Changes nothing.

        A part of a key is sufficient if it includes what the hint includes. Raises Invalid if the text is too long.
        """
        ids, _ = await self._matched(await self._scan(text))
        name = key_scanner.as_text(text).strip()
        if not ids and name and len(name) <= _NAME_CHARACTERS_MAX and name.isprintable():
            start, end = self._hint_of(name)
            rows = await self._database.fetch("keys_matching", name, start, end, self._bound_to, MATCHES_MAX)
            ids = [row["id"] for row in rows]
        shown = [await self._one("key", key_id) for key_id in ids]
        return {"keys": [ENTITIES["key"](row) for row in shown if row is not None]}

    async def _scan(self, text: bytes) -> Scan:
        try:
            # In a thread: a long text takes a while, and must not block the event loop.
            return await asyncio.to_thread(key_scanner.scan, text, self._format)
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
            rows = await self._database.fetch("keys_of_digests", digests[start : start + _BATCH], self._bound_to)
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
        known = {row["prefix"] for row in await self._database.fetch("foreign_prefixes", prefixes, self._bound_to)}
        tried = [(prefix, secret) for prefix, secret in by_prefix if prefix in known]
        if len(tried) > _HASHES_MAX:
            raise Invalid(
                f"more than {_HASHES_MAX} words may be imported keys that were never used: send fewer at once"
            )
        ids: dict[KeyDigest, str] = {}
        for prefix, secret in tried:
            recipe = await self._one("foreign_recipe", prefix)
            shown = None if recipe is None else await asyncio.to_thread(drf_api_keys.hashed, secret, recipe["recipe"])
            row = None if shown is None else await self._one("key_of_foreign", prefix, shown)
            if row is not None:
                ids[secret.digest()] = row["id"]
        return ids

    def _hint_of(self, name: str) -> tuple[str, str]:
        """The start and end of a hint, if `name` is a hint or part of a key; otherwise empty."""
        for mark in ("…", "..."):
            start, found, end = name.partition(mark)
            if found:
                return (start, end) if len(start) + len(end) >= _HINT_CHARACTERS_MIN else ("", "")
        return self._format.hint_start(name), ""
