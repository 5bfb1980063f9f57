"""Guarantees of the tables of OAuth, for any SQL client that writes to them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from keyproxy.oauth.client import row_id
from keyproxy.store.postgres import queries
from tests.store.harness import Sql, add_key, add_user, audit_rows, until_blocked
from tests.store.oauth_rows import (
    CLIENT,
    CLIENT_ID,
    RESOURCE,
    add_access_token,
    add_code,
    add_refresh_token,
    grant_id,
    session_id,
)

D = bytes(32)
OTHER = bytes(31) + b"x"
LATER = datetime(2100, 1, 1, tzinfo=UTC)


@pytest.fixture
async def rows(sql: Sql) -> Sql:
    """One row of each table, and a key."""
    await add_user(sql)
    await add_user(sql, "u_43")
    await add_key(sql)
    await sql.execute("INSERT INTO keyproxy.plans (id) VALUES ('basic')")
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
        await sql.execute("SET CONSTRAINTS ALL IMMEDIATE")
    except asyncpg.IntegrityConstraintViolationError:
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


# -- grants, sessions, codes and tokens


def _grant(**values: Any) -> dict[str, Any]:
    return {"id": grant_id(9), "user_id": "u_43", "client_id": CLIENT, "resource": RESOURCE, "scopes": []} | values


def _session(**values: Any) -> dict[str, Any]:
    return {
        "id": session_id(9),
        "grant_id": grant_id(),
        "presented_as": "c",
        "scopes": [],
        "expires_at": LATER,
    } | values


def _code(**values: Any) -> dict[str, Any]:
    return {
        "digest": OTHER, "grant_id": grant_id(), "client_id": "c", "redirect_uri": "https://a", "challenge": D,
        "scopes": [], "expires_at": LATER,
    } | values  # fmt: skip


def _refresh(**values: Any) -> dict[str, Any]:
    return {"digest": OTHER, "session_id": session_id(), "expires_at": LATER} | values


def _access(**values: Any) -> dict[str, Any]:
    return {"digest": OTHER, "session_id": session_id(), "scopes": [], "expires_at": LATER} | values


def _subject(**values: Any) -> dict[str, Any]:
    return {"issuer": "https://idp", "subject": "t", "user_id": "u_42"} | values


def _assertion(**values: Any) -> dict[str, Any]:
    return {"digest": OTHER, "expires_at": LATER} | values


_VIA_SUBJECT = {"via_issuer": "https://idp", "via_subject": "s"}
_BAD_SCOPES: list[Any] = [None, ["a b"], ["*"], [""], [None], ["a"] * 129]

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("oauth_grants", _grant()),
    ("oauth_grants", _grant(user_id="u_42", resource="https://other.example")),
    ("oauth_grants", _grant(is_service=True)),
    ("oauth_grants", _grant(scopes=["a"] * 128, plan_id="basic")),
    ("oauth_sessions", _session(via_key="key_1")),
    ("oauth_sessions", _session(**_VIA_SUBJECT)),
    ("oauth_sessions", _session(presented_as="a" * 2000)),
    ("oauth_codes", _code(**_VIA_SUBJECT, client_id="a" * 2000, redirect_uri="https://a" + "a" * 491)),
    ("oauth_codes", _code(via_key="key_1", scopes=["jobs:write"], session_id=session_id())),
    ("oauth_refresh_tokens", _refresh(follows=D)),
    ("oauth_access_tokens", _access(bound_to=D)),
    ("oauth_subjects", _subject()),
    ("oauth_subjects", _subject(issuer="https://other", subject="s")),
    ("oauth_assertions", _assertion()),
]
BAD: list[tuple[str, dict[str, Any]]] = [
    *[("oauth_grants", _grant(id=value)) for value in (grant_id(), "gra_1", session_id(), "gra_" + "-" * 22, None)],
    *[
        ("oauth_grants", _grant(**{name: None}))
        for name in ("user_id", "client_id", "resource", "is_test", "is_service")
    ],
    *[("oauth_grants", _grant(user_id=value)) for value in ("u_42", "u_99")],
    ("oauth_grants", _grant(client_id="cli_" + "0" * 32)),
    ("oauth_grants", _grant(plan_id="none")),
    ("oauth_grants", _grant(resource="")),
    ("oauth_grants", _grant(granted_at=None)),
    *[("oauth_grants", _grant(scopes=value)) for value in _BAD_SCOPES],
    *[("oauth_sessions", _session(id=value)) for value in (session_id(), "ses_1", grant_id(9), None)],
    *[
        ("oauth_sessions", _session(**{name: None}))
        for name in ("grant_id", "presented_as", "created_at", "expires_at")
    ],
    *[("oauth_sessions", _session(scopes=value)) for value in _BAD_SCOPES],
    ("oauth_sessions", _session(presented_as="a" * 2001)),
    ("oauth_sessions", _session(grant_id=grant_id(9))),
    *[
        (table, made(**via))
        for table, made in (("oauth_sessions", _session), ("oauth_codes", _code))
        for via in (
            {"via_key": "key_1", **_VIA_SUBJECT},
            {"via_key": "key_9"},
            {"via_issuer": "https://idp"},
            {"via_subject": "s"},
            {"via_issuer": "https://idp", "via_subject": "other"},
        )
    ],
    *[("oauth_codes", _code(digest=value)) for value in (bytes(31), None)],
    *[("oauth_codes", _code(challenge=value)) for value in (bytes(31), bytes(33), None)],
    *[("oauth_codes", _code(**{name: None})) for name in ("grant_id", "client_id", "redirect_uri", "expires_at")],
    *[("oauth_codes", _code(scopes=value)) for value in _BAD_SCOPES],
    ("oauth_codes", _code(redirect_uri="https://a" + "a" * 492)),
    ("oauth_codes", _code(session_id=session_id(9))),
    *[("oauth_refresh_tokens", _refresh(digest=value)) for value in (bytes(31), None)],
    *[("oauth_refresh_tokens", _refresh(**{name: None})) for name in ("session_id", "issued_at", "expires_at")],
    ("oauth_refresh_tokens", _refresh(follows=bytes(31))),
    *[("oauth_access_tokens", _access(digest=value)) for value in (bytes(31), None)],
    *[("oauth_access_tokens", _access(**{name: None})) for name in ("session_id", "issued_at", "expires_at")],
    *[("oauth_access_tokens", _access(scopes=value)) for value in _BAD_SCOPES],
    ("oauth_access_tokens", _access(bound_to=bytes(31))),
    ("oauth_subjects", _subject(subject="s")),
    *[("oauth_subjects", _subject(**{name: None})) for name in ("issuer", "subject", "user_id", "created_at")],
    ("oauth_subjects", _subject(user_id="u_99")),
    *[("oauth_assertions", _assertion(digest=value)) for value in (D, bytes(31), None)],
    ("oauth_assertions", _assertion(expires_at=None)),
]


async def test_rows_hold_what_the_model_allows_and_refer_to_rows_that_exist(rows: Sql) -> None:
    assert [one for one in GOOD if not await _accepts(rows, *one)] == []
    assert [one for one in BAD if await _accepts(rows, *one)] == []


async def test_a_service_has_one_grant_for_each_resource(rows: Sql) -> None:
    await add_user(rows, "u_44")
    await _insert(rows, "oauth_grants", _grant(is_service=True))
    assert not await _accepts(rows, "oauth_grants", _grant(id=grant_id(10), user_id="u_44", is_service=True))
    assert await _accepts(rows, "oauth_grants", _grant(id=grant_id(10), user_id="u_44"))
    other = _grant(id=grant_id(10), user_id="u_44", is_service=True, resource="https://other.example")
    assert await _accepts(rows, "oauth_grants", other)


@pytest.mark.parametrize(
    ("statement", "left"),
    [
        ("DELETE FROM keyproxy.users WHERE id = 'u_42'", ["oauth_clients", "oauth_assertions"]),
        ("DELETE FROM keyproxy.oauth_clients", ["oauth_subjects", "oauth_assertions"]),
        ("DELETE FROM keyproxy.oauth_grants", ["oauth_clients", "oauth_subjects", "oauth_assertions"]),
        (
            "DELETE FROM keyproxy.oauth_sessions",
            ["oauth_clients", "oauth_grants", "oauth_codes", "oauth_subjects", "oauth_assertions"],
        ),
    ],
)
async def test_deletion_ends_all_that_depends_on_the_row(rows: Sql, statement: str, left: list[str]) -> None:
    await rows.execute("UPDATE keyproxy.oauth_codes SET session_id = $1", session_id())
    await rows.execute(statement)
    tables = (
        "oauth_clients", "oauth_grants", "oauth_sessions", "oauth_codes", "oauth_refresh_tokens", "oauth_access_tokens",
        "oauth_subjects", "oauth_assertions",
    )  # fmt: skip
    found = [table for table in tables if await rows.fetchval(f"SELECT count(*) FROM keyproxy.{table}")]
    assert sorted(found) == sorted(left)
    assert await rows.fetchval("SELECT count(session_id) FROM keyproxy.oauth_codes") == 0


@pytest.mark.parametrize(
    ("statement", "left"),
    [
        ("DELETE FROM keyproxy.oauth_subjects", 0),
        ("UPDATE keyproxy.oauth_subjects SET user_id = 'u_43'", 0),
        ("UPDATE keyproxy.oauth_subjects SET user_id = 'u_43', subject = 'other'", 0),
        ("UPDATE keyproxy.oauth_subjects SET subject = 'other'", 1),
        ("UPDATE keyproxy.users SET id = 'u_new' WHERE id = 'u_42'", 1),
    ],
)
async def test_subject_that_is_unlinked_or_given_to_another_user_ends_its_sessions_and_codes(
    rows: Sql, statement: str, left: int
) -> None:
    await _insert(rows, "oauth_sessions", _session(**_VIA_SUBJECT))
    await _insert(rows, "oauth_codes", _code(**_VIA_SUBJECT))
    await rows.execute(statement)
    assert await rows.fetchval("SELECT count(*) FROM keyproxy.oauth_sessions WHERE via_issuer IS NOT NULL") == left
    assert await rows.fetchval("SELECT count(*) FROM keyproxy.oauth_codes WHERE via_issuer IS NOT NULL") == left


async def test_session_that_is_opened_while_its_subject_is_given_to_another_user_is_ended(rows: Sql, dsn: str) -> None:
    await _insert(rows, "oauth_codes", _code(**_VIA_SUBJECT))
    other: Sql = await asyncpg.connect(dsn)
    transaction = rows.transaction()
    await transaction.start()
    await rows.execute(queries.load()["hold_oauth_code"], OTHER)
    giving = asyncio.create_task(other.execute("UPDATE keyproxy.oauth_subjects SET user_id = 'u_43'"))
    await until_blocked(rows, "UPDATE keyproxy.oauth_subjects")
    await _insert(rows, "oauth_sessions", _session(**_VIA_SUBJECT))
    await transaction.commit()
    await giving
    await other.close()
    assert await rows.fetchval("SELECT count(*) FROM keyproxy.oauth_sessions WHERE via_issuer IS NOT NULL") == 0


async def test_plan_of_a_grant_cannot_be_deleted(rows: Sql) -> None:
    await rows.execute("UPDATE keyproxy.oauth_grants SET plan_id = 'basic'")
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await rows.execute("DELETE FROM keyproxy.plans")


# -- codes by a key that changes at the same time


@pytest.mark.parametrize(
    ("change", "is_stored"),
    [
        ("revoked_at = now()", False),
        ("expires_at = now()", False),
        ("scopes = '{}'", False),
        ("expires_at = now() + interval '1 hour'", True),
        ("name = 'x'", True),
    ],
)
async def test_code_is_not_stored_if_its_key_is_revoked_or_narrowed_at_the_same_time(
    rows: Sql, dsn: str, change: str, is_stored: bool
) -> None:
    other: Sql = await asyncpg.connect(dsn)
    transaction = rows.transaction()
    await transaction.start()
    await rows.execute(f"UPDATE keyproxy.api_keys SET {change}")
    storing = asyncio.create_task(_insert(other, "oauth_codes", _code(via_key="key_1", scopes=["jobs:write"])))
    await until_blocked(rows, "oauth_codes")
    await transaction.commit()
    failure = await asyncio.gather(storing, return_exceptions=True)
    assert [type(one) for one in failure] == [type(None) if is_stored else asyncpg.ForeignKeyViolationError]
    await other.close()


@pytest.mark.parametrize("change", ["revoked_at = now()", "scopes = '{}'", "expires_at = now() + interval '1 hour'"])
async def test_session_that_is_opened_while_its_key_changes_is_ended_or_shortened(
    rows: Sql, dsn: str, change: str
) -> None:
    await _insert(rows, "oauth_codes", _code(via_key="key_1", scopes=["jobs:write"]))
    other: Sql = await asyncpg.connect(dsn)
    transaction = rows.transaction()
    await transaction.start()
    await rows.execute(queries.load()["hold_oauth_code"], OTHER)
    changing = asyncio.create_task(other.execute(f"UPDATE keyproxy.api_keys SET {change}"))
    await until_blocked(rows, "UPDATE keyproxy.api_keys")
    await _insert(rows, "oauth_sessions", _session(via_key="key_1"))
    await transaction.commit()
    await changing
    await other.close()
    query = "SELECT expires_at <= now() + interval '1 hour' FROM keyproxy.oauth_sessions WHERE via_key IS NOT NULL"
    assert await rows.fetchval(query) in (None, True)


# -- the audit log


async def test_changes_are_in_the_audit_log_with_their_tenant_and_without_secrets(rows: Sql) -> None:
    await rows.execute("UPDATE keyproxy.oauth_grants SET plan_id = 'basic'")
    await rows.execute("UPDATE keyproxy.oauth_sessions SET expires_at = now()")
    await _insert(rows, "oauth_clients", _client(auth_method="client_secret", secret_digest=D))
    before = await audit_rows(rows)
    await rows.execute("UPDATE keyproxy.oauth_clients SET secret_digest = sha256('x') WHERE client_id = 'worker'")
    assert await audit_rows(rows) == before + 1
    await rows.execute("UPDATE keyproxy.oauth_sessions SET last_used_at = now()")
    await rows.execute("UPDATE keyproxy.oauth_grants SET plan_id = 'basic'")
    assert await audit_rows(rows) == before + 1
    await rows.execute("DELETE FROM keyproxy.tenants")
    found = await rows.fetch(
        "SELECT entity, action, entity_id, tenant_id FROM keyproxy.audit_log WHERE entity LIKE 'oauth%' ORDER BY id"
    )
    subject = "https://idp s"
    assert sorted(map(tuple, found), key=str) == sorted(
        [
            *[("oauth_client", action, row_id("worker"), None) for action in ("insert", "update")],
            ("oauth_client", "insert", CLIENT, None),
            *[("oauth_grant", action, grant_id(), "acme") for action in ("insert", "update", "delete")],
            *[("oauth_session", action, session_id(), "acme") for action in ("insert", "update", "delete")],
            *[("oauth_subject", action, subject, "acme") for action in ("insert", "delete")],
        ],
        key=str,
    )
    shown = await rows.fetchval(
        "SELECT string_agg(coalesce(before::text, '') || coalesce(after::text, ''), '') FROM keyproxy.audit_log"
    )
    assert "secret_digest" not in shown
    assert "last_used_at" not in shown


async def test_each_truncated_table_is_in_the_audit_log(rows: Sql) -> None:
    await rows.execute("TRUNCATE keyproxy.oauth_clients, keyproxy.oauth_subjects CASCADE")
    found = await rows.fetch("SELECT entity FROM keyproxy.audit_log WHERE action = 'truncate'")
    assert {row["entity"] for row in found} == {"oauth_client", "oauth_grant", "oauth_session", "oauth_subject"}


async def test_pool_of_a_grant_has_the_tenant_of_its_user_also_when_it_is_gone(rows: Sql) -> None:
    for statement in ("SELECT 1", "DELETE FROM keyproxy.oauth_grants", "DELETE FROM keyproxy.users WHERE id = 'u_42'"):
        await rows.execute(statement)
        assert await rows.fetchval("SELECT keyproxy.tenant_of_pool('key', $1)", grant_id()) == "acme"
