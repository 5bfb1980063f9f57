"""Leaked secrets of OAuth: end the session of an access or refresh token, and find the client of a client secret.

A client is not disabled: it may be a service, which has to get another secret first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from keyproxy.model import KeyDigest
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import Entity
from keyproxy.store.postgres.database import Row, Transaction

_BATCH: Final = 10_000


class LeakedSecrets(NamedTuple):
    """The sessions and clients of this store whose secrets have leaked. `digests`: of these secrets."""

    digests: frozenset[KeyDigest] = frozenset()
    sessions: Sequence[str] = ()
    clients: Sequence[Row] = ()


async def find(context: DirectoryContext, digests: Sequence[KeyDigest]) -> LeakedSecrets:
    """Find the sessions and clients by the digests of secrets. A bound directory finds those of its tenant."""
    known: set[KeyDigest] = set()
    sessions: dict[str, None] = {}
    clients: dict[str, Row] = {}
    for start in range(0, len(digests), _BATCH):
        batch = digests[start : start + _BATCH]
        for row in await context.fetch("sessions_of_secrets", batch, context.tenant_id):
            known.add(KeyDigest(row["digest"]))
            sessions[row["id"]] = None
        for row in await context.fetch("clients_of_secrets", batch, context.tenant_id):
            known.add(KeyDigest(row["digest"]))
            clients[row["id"]] = row
    return LeakedSecrets(frozenset(known), list(sessions), list(clients.values()))


async def end(transaction: Transaction, leaked: LeakedSecrets) -> list[Entity]:
    """End the sessions. Return them and the clients as they are reported."""
    found: list[dict[str, Any]] = []
    for session_id in leaked.sessions:
        await transaction.fetch("hold_session", session_id)
        session = await transaction.fetch_row("session", session_id)
        # It may have ended meanwhile.
        if session is not None:
            await transaction.fetch("delete_session", session_id)
            found.append(_leak(session, session["client_id"]) | {"session": session_id, "revoked_now": True})
    return [*found, *(_leak(client, client["id"]) | {"revoked_now": False} for client in leaked.clients)]


def _leak(row: Row, client_id: str) -> dict[str, Any]:
    return {"client": client_id, "user": row["user_id"], "tenant": row["tenant_id"]}
