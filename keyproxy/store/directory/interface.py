"""The operations on tenants, users, keys, plans and the audit log: the port that the command line uses.

`store.directory.directory.Directory` implements it on the database, `cli.remote.remote_directory.RemoteDirectory` on the
admin API. The classes of `Directory` document the methods. One test suite runs on both.

All methods raise DirectoryError or StoreUnavailable.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Protocol

from keyproxy.auth.api_key import SecretKey
from keyproxy.store.directory.directory import (
    AuditFilter,
    Entity,
    EntityPage,
    ImportedKey,
    ImportReport,
    KeyFilter,
    KeyWish,
    Revocation,
)

#: Stands for the default lifetime of the server that issues the key. Only for the admin API.
AS_CONFIGURED_THERE: Final = timedelta(days=-1)


class AccountOperations(Protocol):
    """What tenants and users have in common."""

    async def get(self, account_id: str, /) -> Entity: ...
    async def change(self, account_id: str, changes: Mapping[str, Any], /) -> Entity: ...
    async def delete(self, account_id: str, /) -> Entity: ...


class TenantOperations(AccountOperations, Protocol):
    """The customer organisations."""

    async def create(self, tenant_id: str, name: str, plan: str | None = None) -> Entity: ...
    async def list_by_id(self, after: str, limit: int) -> list[Entity]: ...


class UserOperations(AccountOperations, Protocol):
    """The accounts that keys belong to."""

    async def create(
        self, user_id: str, tenant_id: str, first_key: KeyWish | None, *, plan: str | None = None
    ) -> Entity: ...
    async def list_by_id(self, after: str, limit: int, tenant_id: str | None) -> list[Entity]: ...


class KeyOperations(Protocol):
    """One key at a time, and lists of keys."""

    async def issue(self, user_id: str, wish: KeyWish) -> Entity: ...
    async def get(self, key_id: str) -> Entity: ...
    async def list_by_id(self, after: str, limit: int, wanted: KeyFilter | None = None) -> list[Entity]: ...
    async def list_by_time(
        self, order: str, cursor: str | None, limit: int, wanted: KeyFilter | None = None
    ) -> EntityPage: ...
    async def change(self, key_id: str, changes: Mapping[str, Any]) -> Entity: ...
    async def rotate(self, key_id: str, *, grace: timedelta, expires_in: timedelta | None) -> Entity: ...
    async def revoke(self, key_id: str, reason: str) -> Entity: ...
    async def delete(self, key_id: str) -> Entity: ...


class KeyBatchOperations(Protocol):
    """Many keys at a time."""

    async def issue(self, wishes: Sequence[tuple[str, KeyWish]], *, reissue_unseen: bool = False) -> list[Entity]: ...
    async def count_to_revoke(self, wanted: Revocation) -> int: ...
    def revoke(self, wanted: Revocation, reason: str) -> AsyncGenerator[list[str], None]: ...


class KeyImportOperations(Protocol):
    """Keys that other programs issued."""

    async def run(self, keys: Sequence[ImportedKey], *, dry_run: bool) -> ImportReport: ...


class LeakedKeyOperations(Protocol):
    """Keys in pasted text."""

    async def report_digest(self, digest: bytes, reason: str) -> Entity: ...
    async def report_key(self, key: SecretKey, reason: str) -> Entity: ...
    async def report_text(self, text: bytes, reason: str) -> Entity: ...
    async def find(self, text: bytes) -> Entity: ...


class PlanOperations(Protocol):
    """Named sets of limits."""

    async def set(self, name: str, limits: object) -> Entity: ...
    async def change(self, name: str, changes: Mapping[str, float | None]) -> Entity: ...
    async def get(self, name: str) -> Entity: ...
    async def list_by_id(self, after: str, limit: int) -> list[Entity]: ...
    async def delete(self, name: str) -> Entity: ...


class AuditOperations(Protocol):
    """The audit log."""

    async def list_newest(self, cursor: str | None, limit: int, wanted: AuditFilter | None = None) -> EntityPage: ...
    async def horizon(self) -> int: ...
    async def export(
        self, cursor: str | None, limit: int, wanted: AuditFilter | None = None, *, horizon: int
    ) -> EntityPage: ...


class DirectoryOperations(Protocol):
    """All operations, by kind of entity."""

    @property
    def tenants(self) -> TenantOperations: ...
    @property
    def users(self) -> UserOperations: ...
    @property
    def keys(self) -> KeyOperations: ...
    @property
    def key_batches(self) -> KeyBatchOperations: ...
    @property
    def key_importer(self) -> KeyImportOperations: ...
    @property
    def leaked_keys(self) -> LeakedKeyOperations: ...
    @property
    def plans(self) -> PlanOperations: ...
    @property
    def audit(self) -> AuditOperations: ...
