"""What a consent stores about each kind of client, and what it leaves as it is."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from keyproxy.oauth.client import AuthMethod, Client, ClientKind
from keyproxy.store.oauth.authorizations import Authorizations, ConsentingUser, ConsentRefused, NewCode
from keyproxy.store.postgres.database import Database
from tests.store.harness import Sql, add_user, until_blocked

USER = ConsentingUser("u_1")
DOCUMENT = Client(
    "https://acme.example/client", "https://acme.example/client", ClientKind.DOCUMENT, "Acme", ("https://acme.example/cb",),
    auth_method=AuthMethod.PRIVATE_KEY_JWT, jwks='{"keys": []}',
)  # fmt: skip


def code(number: int = 1, *scopes: str) -> NewCode:
    return NewCode(
        bytes([number]) * 32,
        "https://acme.example/cb",
        b"c" * 32,
        resource="https://x/mcp",
        is_test=False,
        scopes=scopes,
    )


@pytest.fixture
async def authorizations(database: Database, sql: Sql) -> Authorizations:
    """The store, with one user."""
    await add_user(sql, "u_1")
    return Authorizations(database)


async def test_client_is_stored_once_and_follows_its_metadata(authorizations: Authorizations, sql: Sql) -> None:
    assert (await authorizations.consent(DOCUMENT, USER, code(1))).is_new_client
    assert not (await authorizations.consent(DOCUMENT, USER, code(2))).is_new_client
    moved = dataclasses.replace(
        DOCUMENT,
        name="Acme 2",
        auth_method=AuthMethod.NONE,
        jwks=None,
        redirect_uris=("https://acme.example/cb", "https://b/c"),
    )
    assert not (await authorizations.consent(moved, USER, code(3))).is_new_client
    row = await sql.fetchrow("SELECT id, kind, name, auth_method, jwks, redirect_uris FROM keyproxy.oauth_clients")
    assert row is not None
    assert tuple(row) == (DOCUMENT.row_id, "document", "Acme 2", "none", None, list(moved.redirect_uris))
    audit = await sql.fetch("SELECT action, after FROM keyproxy.audit_log WHERE entity = 'oauth_client' ORDER BY id")
    assert [row["action"] for row in audit] == ["insert", "update"], "an unchanged client is not written again"
    assert json.loads(audit[0]["after"])["jwks"] == {"keys": []}


async def test_consent_does_not_change_a_client_of_an_operator(authorizations: Authorizations, sql: Sql) -> None:
    registered = Client("worker", "worker", ClientKind.REGISTERED, "Other name", ("https://acme.example/cb",))
    with pytest.raises(ConsentRefused, match="client_unknown"):
        await authorizations.consent(registered, USER, code())
    await sql.execute(
        "INSERT INTO keyproxy.oauth_clients (id, client_id, kind, name) VALUES ($1, 'worker', 'registered', 'Worker')",
        registered.row_id,
    )
    await authorizations.consent(registered, USER, code())
    assert await sql.fetchval("SELECT name FROM keyproxy.oauth_clients") == "Worker"


async def test_consent_through_a_subject_ends_with_its_link(authorizations: Authorizations, sql: Sql) -> None:
    linked = ConsentingUser("u_1", via_issuer="https://idp.example", via_subject="s")
    with pytest.raises(ConsentRefused, match="login_ended"):
        await authorizations.consent(DOCUMENT, linked, code())
    await sql.execute("INSERT INTO keyproxy.oauth_subjects VALUES ('https://idp.example', 's', 'u_1')")
    await authorizations.consent(DOCUMENT, linked, code())
    await sql.execute("DELETE FROM keyproxy.oauth_subjects")
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_codes") == 0


async def test_consent_through_a_subject_that_is_given_to_another_user_at_the_same_time_is_refused(
    authorizations: Authorizations, sql: Sql
) -> None:
    await add_user(sql, "u_2")
    await sql.execute("INSERT INTO keyproxy.oauth_subjects VALUES ('https://idp.example', 's', 'u_1')")
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute("UPDATE keyproxy.oauth_subjects SET user_id = 'u_2'")
    linked = ConsentingUser("u_1", via_issuer="https://idp.example", via_subject="s")
    consenting = asyncio.create_task(authorizations.consent(DOCUMENT, linked, code()))
    await until_blocked(sql, "oauth_subjects")
    await transaction.commit()
    with pytest.raises(ConsentRefused, match="login_ended"):
        await consenting


async def test_resources_of_one_client_are_grants_of_their_own(authorizations: Authorizations, sql: Sql) -> None:
    first = await authorizations.consent(DOCUMENT, USER, code(1, "b", "a"))
    other = dataclasses.replace(code(2, "c"), resource="https://x/test-mcp", is_test=True)
    second = await authorizations.consent(DOCUMENT, USER, other)
    assert first.grant_id != second.grant_id
    again = await authorizations.consent(DOCUMENT, USER, code(3, "c", "a"))
    assert again.grant_id == first.grant_id
    rows = await sql.fetch("SELECT scopes, is_test FROM keyproxy.oauth_grants ORDER BY is_test")
    assert [tuple(row) for row in rows] == [(["a", "b", "c"], False), (["c"], True)]


async def test_grant_has_at_most_128_scopes_and_the_new_ones_among_them(
    authorizations: Authorizations, sql: Sql
) -> None:
    earlier = [f"a:{number}" for number in range(128)]
    await authorizations.consent(DOCUMENT, USER, code(1, *earlier))
    await authorizations.consent(DOCUMENT, USER, code(2, "z", "a:5"))
    scopes = await sql.fetchval("SELECT scopes FROM keyproxy.oauth_grants")
    assert len(scopes) == 128
    assert {"z", "a:5"} <= set(scopes)
    assert set(scopes) <= {*earlier, "z"}
