"""Provider keys: the credentials of upstreams that are stored sealed, shared by all tenants or one tenant's own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final, NamedTuple

from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ENTITIES, Entity, random_digits
from keyproxy.store.directory.errors import Conflict, Invalid, NotFound
from keyproxy.store.postgres.database import Row, StoreConflict, Transaction
from keyproxy.store.postgres.times import time_text

#: How many rows one statement reads for sealing them again.
_PORTION: Final = 500


class SealedSecret(NamedTuple):
    """A secret as it is stored: the name of the key that sealed it, the sealed bytes, and the hint."""

    sealed_with: str
    sealed: bytes
    hint: str


class SecretHandler:
    """What a directory needs to handle secrets: the configured providers, the key file, and the upstream."""

    def seal(self, provider: str, tenant_id: str | None, row_id: str, secret: str, *, is_test: bool) -> SealedSecret:
        """Seal a secret for its row. Raises Invalid for an unknown provider or secret, Conflict without a key."""
        raise NotImplementedError

    def newest_key(self) -> str:
        """The name of the key that seals. Raises Conflict without one."""
        raise NotImplementedError

    def reseal(self, key: Entity, sealed: bytes) -> SealedSecret | None:
        """Seal a stored secret again, with the newest key. None: it does not open. Raises Conflict without a key."""
        raise NotImplementedError

    async def check(self, provider: str, secret: str, *, is_test: bool) -> int:
        """The status of the upstream's response to a request with this secret.

        Raises Invalid if it is 401, Conflict if there is no response.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ProviderKeyStore:
    """The operations on provider keys. No result has the secret. `secrets` None: this directory only reads and revokes.

    A directory that is bound to a tenant neither sees nor changes shared keys.
    """

    _context: DirectoryContext
    _secrets: SecretHandler | None

    async def add(
        self, provider: str, secret: str, *, tenant_id: str | None = None, is_test: bool = False, check: bool = False
    ) -> Entity:
        """Store a secret of a provider, for one tenant or shared, and return its row. Older ones stay usable.

        `check`: send a request with the secret first; nothing is stored if the upstream refuses it or does not respond.
        Raises NotFound for an unknown tenant, Invalid, or Conflict.
        """
        if not self._context.includes_tenant(tenant_id):
            self._context.require_unbound("add a provider key for another tenant, or a shared one")
        row_id = _new_id()
        sealed = self._handler.seal(provider, tenant_id, row_id, secret, is_test=is_test)
        status = await self._handler.check(provider, secret, is_test=is_test) if check else None
        try:
            async with self._context.transaction() as transaction:
                await transaction.fetch(
                    "add_provider_key", row_id, provider, tenant_id, is_test, sealed.sealed, sealed.sealed_with,
                    sealed.hint, status,
                )  # fmt: skip
                return await self._read(transaction, row_id)
        except StoreConflict as error:
            raise _refusal(error, tenant_id) from error

    async def get(self, key_id: str) -> Entity:
        """Return one provider key."""
        return await self._context.get("provider_key", key_id)

    async def list_by_id(
        self, after: str, limit: int, *, provider: str | None = None, tenant_id: str | None = None
    ) -> list[Entity]:
        """List provider keys, ordered by id."""
        may_be, tenant = self._context.tenant_filter(tenant_id)
        if not may_be:
            return []
        return await self._context.list_entities("provider_key", "provider_keys", after, limit, provider, tenant)

    async def rotate(self, key_id: str, secret: str, *, grace: timedelta, check: bool = False) -> Entity:
        """Replace a provider key by one with another secret, which is used within a second. Return the new row.

        The old one stays usable for `grace`, or until its end if that is sooner: it is used if the upstream refuses the
        new one. `replaces` and `old_ends_at` describe it. Raises Conflict for a revoked one, or one that has ended.
        """
        if grace < timedelta(0):
            raise Invalid("the grace period must not be negative")
        row_id, handler = _new_id(), self._handler
        old = await self.get(key_id)
        provider, tenant_id, is_test = old["provider"], old["tenant"], old["is_test"]
        sealed = handler.seal(provider, tenant_id, row_id, secret, is_test=is_test)
        status = await handler.check(provider, secret, is_test=is_test) if check else None
        try:
            async with self._context.transaction() as transaction:
                old = await self._context.lock(transaction, "provider_key", key_id)
                if (old["provider"], old["tenant"], old["is_test"]) != (provider, tenant_id, is_test):
                    raise Conflict(f"provider key {key_id!r} has changed meanwhile: try again")
                if old["state"] in ("revoked", "ended"):
                    end = "was revoked" if old["state"] == "revoked" else "has ended"
                    raise Conflict(f"provider key {key_id!r} {end}: add a new one")
                await transaction.fetch(
                    "add_provider_key", row_id, provider, tenant_id, is_test, sealed.sealed, sealed.sealed_with,
                    sealed.hint, status,
                )  # fmt: skip
                ended = await transaction.fetch_row("end_provider_key", key_id, grace)
                found = await self._read(transaction, row_id)
        except StoreConflict as error:
            raise _refusal(error, tenant_id) from error
        ends_at = None if ended is None else time_text(ended["ends_at"])
        return {**found, "replaces": key_id, "old_ends_at": ends_at}

    async def revoke(self, key_id: str) -> Entity:
        """Revoke a provider key permanently. A revoked one stays unchanged.

        While a tenant has rows of its own, none of them usable, its requests are refused: the shared key is never used.
        """
        async with self._context.transaction() as transaction:
            await self._context.lock(transaction, "provider_key", key_id)
            await transaction.fetch("revoke_provider_key", key_id)
            return await self._read(transaction, key_id)

    async def delete(self, key_id: str) -> Entity:
        """Delete a provider key. Without the last row of a tenant, its requests use the shared key again."""
        return await self._context.delete("provider_key", key_id, None)

    async def reseal(self) -> Entity:
        """Seal all rows with the newest key of the key file. `resealed`: their number; `failed`: ids that do not open.

        Then the older keys of the file are needed by the failed rows only.
        """
        self._context.require_unbound("seal provider keys again")
        handler = self._handler
        kid, after, failed, resealed = handler.newest_key(), "", [], 0
        async with self._context.transaction() as transaction:
            while rows := await transaction.fetch("provider_keys_to_reseal", kid, after, _PORTION):
                after = rows[-1]["id"]
                for row in rows:
                    sealed = handler.reseal(ENTITIES["provider_key"](row), row["sealed"])
                    if sealed is None:
                        failed.append(row["id"])
                    else:
                        await transaction.fetch("reseal_provider_key", row["id"], sealed.sealed, sealed.sealed_with)
                        resealed += 1
        return {"sealed_with": kid, "resealed": resealed, "failed": failed}

    @property
    def _handler(self) -> SecretHandler:
        if self._secrets is None:
            raise TypeError("this directory was made without the means to handle secrets")
        return self._secrets

    async def _read(self, transaction: Transaction, key_id: str) -> Entity:
        row: Row | None = await transaction.fetch_row("provider_key", key_id)
        if row is None:
            raise NotFound(f"there is no provider key {key_id!r}")
        return ENTITIES["provider_key"](row)


def _new_id() -> str:
    return "pvk_" + random_digits()


def _refusal(error: StoreConflict, tenant_id: str | None) -> Exception:
    if error.constraint == "provider_keys_tenant_id_fkey":
        return NotFound(f"there is no tenant {tenant_id!r}: create it first")
    if error.constraint == "provider_keys_bound":
        return Conflict("the provider has 64 keys of this tenant, which is the most: delete some")
    return error
