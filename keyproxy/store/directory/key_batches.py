"""Issue and revoke many keys, in batches of one transaction each.

Every operation can be interrupted and run again: what is done already is skipped. The caller drives the batches, so that
it can report progress, and stop between any two.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from keyproxy.auth.api_key import SecretKey
from keyproxy.store.directory.access.authority import check_scopes, hold_roles, key_warnings
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import Entity, KeyWish, lifetime, new_key_id, reveal, with_warnings
from keyproxy.store.directory.errors import Invalid, NotFound
from keyproxy.store.postgres.times import time_text

BATCH_MAX: Final = 1000

#: The reason for revoking a key whose secret was lost.
_REISSUED: Final = "issued again: its secret was lost before it was used"


@dataclass(frozen=True, slots=True)
class Revocation:
    """Which keys to revoke. All given conditions apply, and at least one is required."""

    user: str | None = None
    tenant: str | None = None
    older_than: timedelta | None = None
    unused_for: timedelta | None = None

    def __post_init__(self) -> None:
        """Raises Invalid."""
        if self.user is None and self.tenant is None and self.older_than is None and self.unused_for is None:
            raise Invalid("select the keys to revoke: by user, tenant, age or time without use")


@dataclass(frozen=True, slots=True)
class KeyBatches:
    """The operations on many keys."""

    _context: DirectoryContext

    async def count_to_revoke(self, wanted: Revocation) -> int:
        """How many keys `revoke` would revoke. Raises NotFound for an unknown user or tenant."""
        await self._check_owner(wanted)
        row = await self._context.fetch_row("count_to_revoke", *self._revocation(wanted))
        return 0 if row is None else row["keys"]

    async def revoke(
        self, wanted: Revocation, reason: str, *, batch: int = BATCH_MAX
    ) -> AsyncGenerator[list[str], None]:
        """Revoke keys permanently; yield the ids of each batch. Keys that are already revoked stay unchanged."""
        await self._check_owner(wanted)
        last = ""
        while True:
            async with self._context.transaction() as transaction:
                rows = await transaction.fetch("revoke_keys", last, batch, reason, *self._revocation(wanted))
            if not rows:
                return
            ids = sorted(row["id"] for row in rows)
            last = ids[-1]
            yield ids

    async def issue(self, wishes: Sequence[tuple[str, KeyWish]], *, reissue_unseen: bool = False) -> list[Entity]:
        """Issue a key for each (user id, wish), all or none of them, at most BATCH_MAX.

        A user with a working key of that name and mode gets no other, so that the same wishes can be sent again. Return,
        in the order of the wishes: `id`, `user`, `name`, `hint`, `scopes`, `roles`, `acts_for`, `is_test`, `plan`,
        `expires_at`, `secret` and `reissues`; `created`: whether a key was issued; the other fields are present only if
        so. The first issued one has the `warnings` of all, if any. Raises NotFound for an unknown user or role.

        `reissue_unseen`: a working key that matches the wish and was never used is revoked and issued again, because
        its secret was lost. `reissues` is its id. A key that was used, rotated or imported stays.
        """
        if len(wishes) > BATCH_MAX:
            raise Invalid(f"at most {BATCH_MAX} keys can be issued at once")
        first = {(user, wish.name, wish.is_test): number for number, (user, wish) in reversed([*enumerate(wishes)])}
        made: list[tuple[dict[str, Any], SecretKey]] = []
        for number, (user, wish) in enumerate(wishes):
            if first[user, wish.name, wish.is_test] == number:
                made.append(self._row_of(user, wish))
        plans = {wish.plan for _, wish in wishes if wish.plan is not None}
        async with self._context.transaction("' or '".join(sorted(plans)) or None) as transaction:
            users = sorted({user for user, _ in wishes})
            there = await transaction.fetch("hold_users", users)
            missing = set(users) - {row["id"] for row in there if self._context.includes_tenant(row["tenant_id"])}
            if missing:
                raise NotFound(f"there is no user {min(missing)!r}: create it first")
            await hold_roles(transaction, {role for _, wish in wishes for role in wish.roles})
            described = json.dumps([row for row, _ in made])
            lost = await transaction.fetch("revoke_unseen", described, _REISSUED) if reissue_unseen else []
            rows = await transaction.fetch("issue_keys", described, self._context.tenant_id)
            made_ids = [row["id"] for row in rows]
            await check_scopes(transaction, keys=made_ids)
            warnings = await key_warnings(transaction, made_ids)
        reissued = {(row["user_id"], row["name"], row["is_test"]): row["id"] for row in lost}
        expiries = {row["id"]: row["expires_at"] for row in rows}
        by_wish = {(row["user_id"], row["name"], row["is_test"]): (row, secret) for row, secret in made}
        issued: list[Entity] = []
        for number, (user, wish) in enumerate(wishes):
            row, secret = by_wish[user, wish.name, wish.is_test]
            if row["id"] not in expiries or first[user, wish.name, wish.is_test] != number:
                issued.append({"user": user, "name": wish.name, "created": False})
                continue
            reissues = reissued.get((user, wish.name, wish.is_test))
            issued.append(with_warnings(_issued(row, secret, time_text(expiries[row["id"]]), reissues), warnings))
            warnings = []
        return issued

    def _row_of(self, user: str, wish: KeyWish) -> tuple[dict[str, Any], SecretKey]:
        secret = self._context.new_secret(is_test=wish.is_test)
        life = lifetime(wish.expires_in)
        row = {
            "id": new_key_id(),
            "user_id": user,
            "digest": secret.digest().hex(),
            "hint": self._context.key_format.hint(secret),
            "name": wish.name,
            "scopes": list(wish.scopes),
            "roles": list(wish.roles),
            "acts_for": wish.acts_for,
            "is_test": wish.is_test,
            "life_seconds": None if life is None else life.total_seconds(),
            "plan": wish.plan,
        }
        return row, secret

    async def _check_owner(self, wanted: Revocation) -> None:
        if wanted.user is not None:
            await self._context.get("user", wanted.user)
        if wanted.tenant is not None:
            await self._context.get("tenant", wanted.tenant)

    def _revocation(self, wanted: Revocation) -> tuple[object, ...]:
        return wanted.user, wanted.tenant or self._context.tenant_id, wanted.older_than, wanted.unused_for


def _issued(row: Mapping[str, Any], secret: SecretKey, expires_at: str | None, reissues: str | None) -> Entity:
    return {
        "id": row["id"],
        "user": row["user_id"],
        "name": row["name"],
        "created": True,
        "hint": row["hint"],
        "scopes": row["scopes"],
        "roles": row["roles"],
        "acts_for": row["acts_for"],
        "is_test": row["is_test"],
        "plan": row["plan"],
        "expires_at": expires_at,
        "secret": reveal(secret),
        "reissues": reissues,
    }
