"""The rows of OAuth clients, as the authorization server reads them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from keyproxy.oauth.client import AuthMethod, Client, ClientKind
from keyproxy.store.postgres.database import Row, StatementRunner


@dataclass(frozen=True, slots=True)
class StoredClient:
    """One row. `client`: as it is stored, presented as its own id."""

    client: Client
    is_disabled: bool


class ClientRows:
    """Reads rows of `oauth_clients`. Raises StoreUnavailable."""

    def __init__(self, database: StatementRunner) -> None:
        self._database = database

    async def by_id(self, row_ids: Collection[str]) -> dict[str, StoredClient]:
        """The rows with these ids (`cli_…`), by id; absent ones are left out."""
        rows = await self._database.fetch("oauth_clients_by_id", list(row_ids))
        return {row["id"]: _stored(row) for row in rows}

    async def of_credential(self, presented_as: str, digest: bytes) -> StoredClient | None:
        """The client that a code or token with this digest was issued to, if it presented itself by this id."""
        rows = await self._database.fetch("oauth_client_of_credential", presented_as, digest)
        return _stored(rows[0]) if rows else None


def _stored(row: Row) -> StoredClient:
    client = Client(
        row["client_id"],
        row["client_id"],
        ClientKind(row["kind"]),
        row["name"],
        tuple(row["redirect_uris"]),
        AuthMethod(row["auth_method"]),
        secret_digest=row["secret_digest"],
        jwks=row["jwks"],
        tls_subject=row["tls_subject"],
    )
    return StoredClient(client, row["disabled_at"] is not None)
