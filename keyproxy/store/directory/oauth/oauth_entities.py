"""The rows of OAuth clients, grants, sessions and subjects as JSON values. None has a secret or its digest."""

from __future__ import annotations

from typing import Any, Final

from keyproxy.store.postgres.database import Row
from keyproxy.store.postgres.json_values import read_json
from keyproxy.store.postgres.times import time_text


def _client(row: Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "client_id": row["client_id"],
        "kind": row["kind"],
        "name": row["name"],
        "auth_method": row["auth_method"],
        "redirect_uris": list(row["redirect_uris"]),
        "jwks": None if row["jwks"] is None else read_json(row["jwks"]),
        "tls_subject": row["tls_subject"],
        "disabled_at": time_text(row["disabled_at"]),
        "created_at": time_text(row["created_at"]),
        "users": list(row["users"]),
        "grants": row["grants"],
    }


def _grant(row: Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "user": row["user_id"],
        "tenant": row["tenant_id"],
        "client": row["client_id"],
        "client_name": row["client_name"],
        "resource": row["resource"],
        "scopes": list(row["scopes"]),
        "is_test": row["is_test"],
        "is_service": row["is_service"],
        "plan": row["plan_id"],
        "granted_at": time_text(row["granted_at"]),
        "sessions": row["sessions"],
    }


def _session(row: Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "grant": row["grant_id"],
        "user": row["user_id"],
        "tenant": row["tenant_id"],
        "client": row["client_id"],
        "client_name": row["client_name"],
        "presented_as": row["presented_as"],
        "scopes": list(row["scopes"]),
        "is_test": row["is_test"],
        "via_key": row["via_key"],
        "via_issuer": row["via_issuer"],
        "via_subject": row["via_subject"],
        "created_at": time_text(row["created_at"]),
        "expires_at": time_text(row["expires_at"]),
        "last_used_at": time_text(row["last_used_at"]),
    }


def _subject(row: Row) -> dict[str, Any]:
    return {
        "issuer": row["issuer"],
        "subject": row["subject"],
        "user": row["user_id"],
        "tenant": row["tenant_id"],
        "created_at": time_text(row["created_at"]),
    }


#: Convert a row of each kind to an entity.
OAUTH_ENTITIES: Final = {
    "client": _client,
    "grant": _grant,
    "session": _session,
    "subject": _subject,
}
