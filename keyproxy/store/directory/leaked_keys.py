"""Look keys up by pasted text, a hint, an id or a name; revoke keys, agent tokens and OAuth tokens that have leaked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from keyproxy.auth import key_scanner
from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.key_scanner import Scan
from keyproxy.model import KeyDigest
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ENTITIES, Entity
from keyproxy.store.directory.errors import Invalid, NotFound
from keyproxy.store.directory.oauth import leaked_secrets
from keyproxy.store.directory.oauth.leaked_secrets import LeakedSecrets
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


class _Matches(NamedTuple):
    """The ids of the keys and agent tokens of this store that are in a text, the secrets of OAuth that are in it, and the
    number of those that the store does not have."""

    keys: list[str]
    agent_tokens: list[str]
    secrets: LeakedSecrets
    unknown: int


@dataclass(frozen=True, slots=True)
class LeakedKeys:
    """The lookup and revocation of leaked keys."""

    _context: DirectoryContext

    async def report_digest(self, digest: bytes, reason: str) -> Entity:
        """Revoke the leaked key or token with this SHA-256 digest (32 bytes), and return its owner.

        `known`: whether there is one. `revoked_now`: whether this call revoked it. `key`: the key, None if it is
        something else: an `agent_token`; an OAuth token, with `session`, which ends, and `client`; or the secret of a
        `client`, which is not disabled.
        """
        if len(digest) != 32:
            raise Invalid("the digest of a key must have 32 bytes (64 hexadecimal digits)")
        row = await self._context.fetch_row("key_of_digest", digest)
        if row is None:
            tokens = await self._context.fetch("agent_tokens_of_digests", [digest], self._context.tenant_id)
            if tokens:
                return await self._revoke("agent_token", tokens[0], reason)
            secrets = await leaked_secrets.find(self._context, [KeyDigest(digest)])
            if secrets.digests:
                async with self._context.transaction() as transaction:
                    leaks = await leaked_secrets.end(transaction, secrets)
                return _UNKNOWN | ({"known": True, **leaks[0]} if leaks else {})
        return await self._revoke("key", row, reason)

    async def report_key(self, key: SecretKey, reason: str) -> Entity:
        """As `report_digest`, for a plaintext: an imported key may not have its digest stored yet."""
        prefix = drf_api_keys.prefix_of(key)
        found = await self.report_digest(key.digest(), reason)
        if found["known"] or prefix is None:
            return found
        recipe = await self._context.fetch_row("foreign_recipe", prefix)
        shown = None if recipe is None else await asyncio.to_thread(drf_api_keys.hashed, key, recipe["recipe"])
        row = None if shown is None else await self._context.fetch_row("key_of_foreign", prefix, shown)
        return await self._revoke("key", row, reason)

    async def _revoke(self, kind: str, row: Row | None, reason: str) -> Entity:
        """`kind`: key or agent_token."""
        if row is None:
            return dict(_UNKNOWN)
        try:
            async with self._context.transaction() as transaction:
                before = await self._context.lock(transaction, kind, row["id"])
                await transaction.fetch(f"revoke_{kind}", row["id"], reason)
            found = await self._context.get(kind, row["id"])
        except NotFound:
            # Deleted meanwhile, or another tenant's: this directory cannot see it.
            return dict(_UNKNOWN)
        return _UNKNOWN | {
            "known": True,
            "revoked_now": before["revoked_at"] is None,
            "user": found["user"],
            "tenant": found["tenant"],
            kind: found,
        }

    async def report_text(self, text: bytes, reason: str) -> Entity:
        """Revoke every key and token in a text, in any notation. Raises Invalid if the text is too long.

        `found`: the keys (`key`, `user`, `tenant`, `revoked_now`) and the agent tokens, which also have the member
        `agent_token`; their `key` is the one that they were cut from, which is not revoked. An OAuth token has `session`
        and `client` in place of `key`: the session ends. The secret of a client has `client`, which is not disabled.
        `incomplete`: the number of truncated ones. `unknown`: the number of those that are not in this store.
        """
        scan = await self._scan(text)
        matches = await self._matched(scan)
        async with self._context.transaction() as transaction:
            tenant = self._context.tenant_id
            rows = [
                *await transaction.fetch("revoke_leaked", matches.keys, reason, tenant),
                *await transaction.fetch("revoke_leaked_tokens", matches.agent_tokens, reason, tenant),
            ]
            revoked = {row["id"] for row in rows}
            shown = [("key", await transaction.fetch_row("key", key_id)) for key_id in matches.keys]
            shown += [("agent_token", await transaction.fetch_row("agent_token", one)) for one in matches.agent_tokens]
            of_oauth = await leaked_secrets.end(transaction, matches.secrets)
        return {
            "found": [
                *(_leak(kind, ENTITIES[kind](row), revoked) for kind, row in shown if row is not None),
                *of_oauth,
            ],
            "incomplete": scan.incomplete,
            "unknown": matches.unknown,
        }

    async def find(self, text: bytes) -> Entity:
        """`keys`: the keys in a text; if it has none, the keys with this id, hint or name. Changes nothing.

        For an agent token in the text, the key that the token was cut from. A part of a key is sufficient if it
        includes what the hint includes. Raises Invalid if the text is too long.
        """
        matches = await self._matched(await self._scan(text))
        ids = list(dict.fromkeys((*matches.keys, *await self._keys_of_tokens(matches.agent_tokens))))
        name = key_scanner.as_text(text).strip()
        if not ids and name and len(name) <= _NAME_CHARACTERS_MAX and name.isprintable():
            start, end = self._hint_of(name)
            rows = await self._context.fetch("keys_matching", name, start, end, self._context.tenant_id, MATCHES_MAX)
            ids = [row["id"] for row in rows]
        shown = [await self._context.fetch_row("key", key_id) for key_id in ids]
        return {"keys": [ENTITIES["key"](row) for row in shown if row is not None]}

    async def _keys_of_tokens(self, token_ids: Sequence[str]) -> list[str]:
        rows = [await self._context.fetch_row("agent_token", token_id) for token_id in token_ids]
        return [row["root_key_id"] for row in rows if row is not None]

    async def _scan(self, text: bytes) -> Scan:
        try:
            # In a thread: a long text takes a while, and must not block the event loop.
            return await asyncio.to_thread(key_scanner.scan, text, self._context.key_format)
        except ValueError as error:
            raise Invalid(str(error)) from error

    async def _matched(self, scan: Scan) -> _Matches:
        """The keys and agent tokens of this store that are in the text."""
        secrets = {secret.digest(): secret for secret in (*scan.keys, *scan.foreign)}
        digests = dict.fromkeys((*secrets, *map(KeyDigest, scan.digests)))
        ids = await self._ids_of(list(digests))
        candidates = [secret for digest, secret in secrets.items() if digest not in ids]
        ids |= await self._never_used(candidates)
        presented = {token.digest() for token in scan.agent_tokens}
        candidates_of_tokens = dict.fromkeys((*presented, *map(KeyDigest, scan.digests)))
        tokens = await self._ids_of(list(candidates_of_tokens), "agent_tokens_of_digests")
        of_oauth = {secret.digest() for secret in scan.oauth_secrets}
        leaked = await leaked_secrets.find(self._context, [*of_oauth, *map(KeyDigest, scan.digests)])
        meant = {secret.digest() for secret in (*scan.keys, *scan.presented)} | presented | of_oauth
        if not secrets and not presented and not of_oauth and len(scan.digests) == 1:
            meant |= set(digests)
        known = ids.keys() | tokens.keys() | leaked.digests
        unknown = scan.admin_tokens + len(meant - known)
        return _Matches(list(dict.fromkeys(ids.values())), list(dict.fromkeys(tokens.values())), leaked, unknown)

    async def _ids_of(self, digests: list[KeyDigest], statement: str = "keys_of_digests") -> dict[KeyDigest, str]:
        ids: dict[KeyDigest, str] = {}
        for start in range(0, len(digests), _BATCH):
            rows = await self._context.fetch(statement, digests[start : start + _BATCH], self._context.tenant_id)
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


def _leak(kind: str, found: Entity, revoked: set[str]) -> Entity:
    """A key or agent token that was found in a text."""
    subject = {"key": found["id"]} if kind == "key" else {"agent_token": found["id"], "key": found["key"]}
    return {**subject, "user": found["user"], "tenant": found["tenant"], "revoked_now": found["id"] in revoked}
