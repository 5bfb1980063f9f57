"""Guarantees of the tables of OAuth, for any SQL client that writes to them."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from keyproxy.oauth.client import row_id
from tests.store.harness import Sql, add_key, add_user
from tests.store.oauth_rows import (
    CLIENT,
    CLIENT_ID,
    add_access_token,
    add_code,
    add_refresh_token,
)

D = bytes(32)
KEY = {"kty": "RSA"}


@pytest.fixture
async def rows(sql: Sql) -> Sql:
    """One row of each table, and a key."""
    await add_user(sql)
    await add_key(sql)
    await add_access_token(sql)
    await add_refresh_token(sql)
    await add_code(sql)
    await sql.execute(
        "INSERT INTO keyproxy.oauth_subjects (issuer, subject, user_id) VALUES ('https://idp', 's', 'u_42')"
    )
    await sql.execute("INSERT INTO keyproxy.oauth_assertions (digest, expires_at) VALUES ($1, now())", D)
    return sql


async def _insert(sql: Sql, table: str, values: dict[str, Any]) -> None:
    """Insert a row, and delete nothing: the caller's transaction is rolled back."""
    places = ", ".join(f"${place}" for place in range(1, len(values) + 1))
    await sql.execute(f"INSERT INTO keyproxy.{table} ({', '.join(values)}) VALUES ({places})", *values.values())


async def _accepts(sql: Sql, table: str, values: dict[str, Any]) -> bool:
    transaction = sql.transaction()
    await transaction.start()
    try:
        await _insert(sql, table, values)
    except (asyncpg.CheckViolationError, asyncpg.NotNullViolationError, asyncpg.UniqueViolationError):
        return False
    finally:
        await transaction.rollback()
    return True


# -- clients


def _client(**values: Any) -> dict[str, Any]:
    client_id = values.get("client_id", "worker")
    return {
        "id": row_id(client_id),
        "client_id": client_id,
        "kind": "registered",
        "name": "n",
        "redirect_uris": [],
    } | values


GOOD_CLIENTS: list[dict[str, Any]] = [
    _client(),
    _client(client_id="a" * 2000),
    _client(client_id="é" * 1000),
    _client(name="n" * 200),
    _client(redirect_uris=["https://a"] * 10),
    *[_client(kind=kind) for kind in ("value", "document", "listed", "registered")],
    _client(auth_method="client_secret", secret_digest=D),
    _client(auth_method="private_key_jwt", jwks="{}"),
    _client(auth_method="private_key_jwt", kind="document"),
    _client(auth_method="tls_client_auth", tls_subject="dns:a"),
    _client(jwks='{"keys": []}'),
]
BAD_CLIENTS: list[dict[str, Any]] = [
    _client(id=row_id("another")),
    _client(id="cli_1"),
    _client(client_id="", id=row_id("")),
    _client(client_id="a" * 2001),
    _client(client_id="é" * 1001),
    _client(client_id=CLIENT_ID, id=CLIENT),  # it has a row already
    _client(name="n" * 201),
    _client(name=None),
    _client(redirect_uris=["https://a"] * 11),
    _client(redirect_uris=[None]),
    _client(redirect_uris=None),
    _client(kind="other"),
    _client(kind=None),
    _client(auth_method="other"),
    _client(auth_method="client_secret"),
    _client(auth_method="client_secret", secret_digest=bytes(31)),
    _client(secret_digest=D),
    _client(auth_method="private_key_jwt", secret_digest=D, jwks="{}"),
    _client(auth_method="private_key_jwt"),
    _client(auth_method="tls_client_auth"),
    _client(tls_subject="dns:a"),
    _client(jwks="[]"),
    *[
        _client(kind=kind, **method)
        for kind in ("value", "listed")
        for method in (
            {"auth_method": "client_secret", "secret_digest": D},
            {"auth_method": "private_key_jwt", "jwks": "{}"},
            {"auth_method": "tls_client_auth", "tls_subject": "dns:a"},
        )
    ],
]


async def test_there_is_one_row_for_each_client_id_with_an_authentication_that_its_kind_allows(rows: Sql) -> None:
    assert [values for values in GOOD_CLIENTS if not await _accepts(rows, "oauth_clients", values)] == []
    assert [values for values in BAD_CLIENTS if await _accepts(rows, "oauth_clients", values)] == []
