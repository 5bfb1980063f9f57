"""OAuth clients, grants, sessions and subjects are managed: the same from the database and through the API."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keyproxy.auth.api_key import KeyFormat
from keyproxy.cli.remote.admin_client import AdminClient
from keyproxy.cli.remote.remote_directory import RemoteDirectory
from keyproxy.config.oauth.oauth_settings import KnownClientRow, OAuthLogin, OAuthSettings
from keyproxy.config.schema import Settings
from keyproxy.oauth.client import AuthMethod, row_id
from keyproxy.oauth.client_ids import encode_value_id
from keyproxy.store.directory.directory import Actor, Conflict, Directory, Invalid, NotFound, OAuthClientWish
from keyproxy.store.directory.interface import DirectoryOperations
from keyproxy.store.directory.oauth import grants
from keyproxy.store.postgres.database import Database
from tests.admin.conftest import FILE_TOKEN, Api, serving
from tests.admin.test_commands import Run, run
from tests.store.harness import Sql
from tests.store.oauth_rows import (
    CLIENT,
    CLIENT_ID,
    RESOURCE,
    TEST_RESOURCE,
    add_access_token,
    add_client,
    add_grant,
    add_session,
    grant_id,
    session_id,
)

__all__ = ["run"]

IDP = "https://idp.example"
SETTINGS = Settings(
    oauth=OAuthSettings(issuer="https://mcp.example.com", resource=RESOURCE, test_resource=TEST_RESOURCE),
    oauth_login=OAuthLogin(issuer=IDP),
)
VALUE_ID = encode_value_id(["https://acme.example/cb"], "Acme")
#: The example of RFC 7517, appendix A.1.
KEY = {
    "kty": "EC", "crv": "P-256", "kid": "k1", "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
    "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
}  # fmt: skip
JWKS = {"keys": [KEY]}
APP_URIS = ("https://app.example/cb", "com.example.app:/cb")
WORKER = OAuthClientWish("worker", AuthMethod.CLIENT_SECRET, user="u_1", scopes=("jobs:write",))


@pytest.fixture
async def api(database: Database) -> AsyncIterator[Api]:
    """An admin API of a system with an authorization server."""
    async with serving(database, settings=SETTINGS) as api:
        await api.user("u_1")
        yield api


@pytest.fixture(params=["database", "api"])
async def operations(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[DirectoryOperations]:
    """Each implementation of the port."""
    if request.param == "database":
        yield api.directory
        return
    async with AdminClient(api.url, FILE_TOKEN) as client:
        yield RemoteDirectory(client)


async def test_service_gets_a_secret_once_and_a_grant_for_its_user(operations: DirectoryOperations, sql: Sql) -> None:
    made = await operations.oauth_clients.create(WORKER)
    assert re.fullmatch("kp_client_[0-9A-Za-z]{49}", made["secret"])
    assert (made["id"], made["client_id"], made["kind"]) == (row_id("worker"), "worker", "registered")
    assert (made["name"], made["auth_method"], made["users"], made["grants"]) == ("worker", "client_secret", ["u_1"], 1)
    digest = await sql.fetchval("SELECT secret_digest FROM keyproxy.oauth_clients")
    assert digest == hashlib.sha256(made["secret"].encode()).digest()
    found = await operations.oauth_clients.get("worker")
    assert found == await operations.oauth_clients.get(made["id"])
    assert {**found, "secret": made["secret"]} == made
    (grant,) = await operations.oauth_grants.list_by_id("", 10, user_id="u_1")
    assert (grant["user"], grant["tenant"], grant["client"]) == ("u_1", "acme", made["id"])
    assert (grant["resource"], grant["scopes"], grant["is_test"]) == (RESOURCE, ["jobs:write"], False)
    assert (grant["is_service"], grant["plan"], grant["sessions"]) == (True, None, 0)


async def test_client_authenticates_by_key_by_certificate_or_not_at_all(operations: DirectoryOperations) -> None:
    wishes = [
        OAuthClientWish("jwt", AuthMethod.PRIVATE_KEY_JWT, user="u_1", jwks=JWKS, is_test=True),
        OAuthClientWish("tls", AuthMethod.TLS_CLIENT_AUTH, user="u_1", tls_subject="dns:worker.example.com"),
        OAuthClientWish("app", AuthMethod.NONE, "My app", redirect_uris=APP_URIS),
    ]  # fmt: skip
    jwt, tls, app = [await operations.oauth_clients.create(wish) for wish in wishes]
    assert [one["secret"] for one in (jwt, tls, app)] == [None] * 3
    assert (jwt["jwks"], tls["tls_subject"]) == (JWKS, "dns:worker.example.com")
    assert (app["name"], app["redirect_uris"]) == ("My app", [*APP_URIS])
    assert (app["users"], app["grants"]) == ([], 0)
    granted = await operations.oauth_grants.list_by_id("", 10)
    assert {(one["client"], one["resource"], one["is_test"]) for one in granted} == {
        (jwt["id"], TEST_RESOURCE, True),
        (tls["id"], RESOURCE, False),
    }
    assert [one["id"] for one in await operations.oauth_clients.list_by_id("", 10, kind="registered")] == sorted(
        [jwt["id"], tls["id"], app["id"]]
    )
    assert await operations.oauth_clients.list_by_id("", 10, kind="value") == []


@pytest.mark.parametrize(
    "changes",
    [
        {"client_id": ""},
        {"client_id": "https://app.example/client.json"},
        {"client_id": VALUE_ID},
        {"client_id": "listed:Claude"},
        {"client_id": "cli_1"},
        {"client_id": "wörker"},
        {"client_id": "w" * 2001},
        {"name": "n" * 201},
        {"name": "two\nlines"},
        {"user": None},
        {"user": None, "redirect_uris": ("https://app.example/cb",)},
        {"scopes": ("jobs:*",)},
        {"redirect_uris": ("http://app.example/cb",)},
        {"redirect_uris": ("javascript:alert(1)",)},
        {"redirect_uris": ("https://app.example/cb",) * 11},
        {"auth_method": AuthMethod.NONE},
        {"auth_method": AuthMethod.PRIVATE_KEY_JWT},
        {"auth_method": AuthMethod.TLS_CLIENT_AUTH},
        {"jwks": JWKS},
        {"tls_subject": "dns:worker.example.com"},
        {"auth_method": AuthMethod.TLS_CLIENT_AUTH, "tls_subject": "worker.example.com"},
        {"auth_method": AuthMethod.TLS_CLIENT_AUTH, "tls_subject": "dns:"},
        {"auth_method": AuthMethod.TLS_CLIENT_AUTH, "tls_subject": "dn:worker"},
        {"auth_method": AuthMethod.PRIVATE_KEY_JWT, "jwks": {}},
        {"auth_method": AuthMethod.PRIVATE_KEY_JWT, "jwks": {"keys": []}},
        {"auth_method": AuthMethod.PRIVATE_KEY_JWT, "jwks": {"keys": [KEY] * 17}},
        {"auth_method": AuthMethod.PRIVATE_KEY_JWT, "jwks": {"keys": [{**KEY, "y": KEY["x"]}]}},
        {"auth_method": AuthMethod.PRIVATE_KEY_JWT, "jwks": {"keys": [{**KEY, "use": "enc"}]}},
        {"auth_method": AuthMethod.PRIVATE_KEY_JWT, "jwks": {"keys": [{**KEY, "x5c": "x" * 70_000}]}},
        {"auth_method": AuthMethod.PRIVATE_KEY_JWT, "jwks": {"keys": [{"kty": "oct", "k": "private-canary"}]}},
        {"auth_method": AuthMethod.PRIVATE_KEY_JWT, "jwks": {"keys": [{**KEY, "d": "private-canary"}]}},
    ],
)
async def test_invalid_client_is_refused_and_nothing_is_stored(api: Api, changes: dict[str, Any]) -> None:
    wish = replace(WORKER, **changes)
    with pytest.raises(Invalid) as refused:
        await api.directory.oauth_clients.create(wish)
    assert "canary" not in str(refused.value)
    async with AdminClient(api.url, FILE_TOKEN) as client:
        with pytest.raises(Invalid) as refused:
            await RemoteDirectory(client).oauth_clients.create(wish)
    assert "canary" not in str(refused.value)
    assert await api.directory.oauth_clients.list_by_id("", 10) == []


async def test_unknown_user_a_taken_id_and_a_missing_resource_are_refused(
    operations: DirectoryOperations, database: Database
) -> None:
    with pytest.raises(NotFound, match="no user"):
        await operations.oauth_clients.create(replace(WORKER, user="missing"))
    await operations.oauth_clients.create(WORKER)
    with pytest.raises(Conflict, match="already"):
        await operations.oauth_clients.create(WORKER)
    async with serving(database) as other:
        for is_test, name in ((False, "oauth.resource"), (True, "oauth.test_resource")):
            with pytest.raises(Conflict, match=name):
                await other.directory.oauth_clients.create(replace(WORKER, client_id="second", is_test=is_test))


@pytest.mark.parametrize(
    ("presented", "client_id", "kind", "name"),
    [
        (VALUE_ID, VALUE_ID, "value", "Acme"),
        (CLIENT_ID, CLIENT_ID, "document", CLIENT_ID),
        ("listed:Claude", "listed:Claude", "listed", "Claude"),
        ("https://claude.ai/oauth/mcp-oauth-client-metadata", "listed:Claude", "listed", "Claude"),
    ],
)
async def test_client_is_disabled_before_it_has_a_row_and_enabled_again(
    operations: DirectoryOperations, presented: str, client_id: str, kind: str, name: str
) -> None:
    with pytest.raises(NotFound):
        await operations.oauth_clients.get(presented)
    disabled = await operations.oauth_clients.change(presented, {"disabled": True})
    assert (disabled["id"], disabled["client_id"]) == (row_id(client_id), client_id)
    assert (disabled["kind"], disabled["name"], disabled["auth_method"]) == (kind, name, "none")
    assert disabled["disabled_at"] is not None
    assert await operations.oauth_clients.change(presented, {"disabled": True}) == disabled
    enabled = await operations.oauth_clients.change(disabled["id"], {"disabled": False})
    assert enabled == {**disabled, "disabled_at": None}
    assert await operations.oauth_clients.delete(presented) == {"id": disabled["id"], "deleted": True}


async def test_registered_client_precedes_a_known_one_with_its_id(api: Api) -> None:
    known = KnownClientRow("Known", ["https://known.example/cb"], ["worker"])
    settings = replace(SETTINGS, oauth_known_clients=(known,))
    clients = Directory(api.database, KeyFormat(), Actor("cli:test", "host"), settings=settings).oauth_clients
    assert (await clients.change("worker", {"disabled": True}))["client_id"] == "listed:Known"
    await clients.create(WORKER)
    assert (await clients.get("worker"))["kind"] == "registered"
    assert (await clients.change("worker", {"disabled": True}))["kind"] == "registered"
    assert (await clients.change("listed:Known", {"disabled": False}))["kind"] == "listed"


@pytest.mark.parametrize("presented", ["worker", "cli_" + "0" * 32, "listed:Fred's", "kpc1_AAAA"])
async def test_client_that_no_id_describes_is_not_found(operations: DirectoryOperations, presented: str) -> None:
    named = re.escape(f"there is no client {presented!r}")
    for disabled in (True, False):
        with pytest.raises(NotFound, match=named):
            await operations.oauth_clients.change(presented, {"disabled": disabled})
    with pytest.raises(NotFound, match=named):
        await operations.oauth_clients.delete(presented)


async def test_plan_of_a_grant_is_set_and_removed_and_the_plan_in_use_stays(
    operations: DirectoryOperations, sql: Sql
) -> None:
    await add_grant(sql, user="u_1")
    await operations.plans.set("basic", {"concurrency": 1})
    assert (await operations.oauth_grants.change(grant_id(), {"plan": "basic"}))["plan"] == "basic"
    with pytest.raises(Conflict, match="1 grant"):
        await operations.plans.delete("basic")
    assert (await operations.oauth_grants.change(grant_id(), {"plan": None}))["plan"] is None
    with pytest.raises(NotFound, match="no plan"):
        await operations.oauth_grants.change(grant_id(), {"plan": "missing"})
    with pytest.raises(NotFound, match="no grant"):
        await operations.oauth_grants.change(grant_id(9), {"plan": "basic"})


async def test_revoked_grant_ends_with_its_sessions_and_tokens(operations: DirectoryOperations, sql: Sql) -> None:
    await add_grant(sql, user="u_1")
    await add_access_token(sql)
    assert (await operations.oauth_grants.get(grant_id()))["sessions"] == 1
    assert await operations.oauth_grants.delete(grant_id()) == {"id": grant_id(), "deleted": True}
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_access_tokens") == 0
    with pytest.raises(NotFound):
        await operations.oauth_sessions.get(session_id())
    with pytest.raises(NotFound):
        await operations.oauth_grants.delete(grant_id())


async def test_sessions_are_listed_and_ended_one_or_all_of_a_user_or_all(
    operations: DirectoryOperations, api: Api, sql: Sql
) -> None:
    await api.user("u_2")
    await add_grant(sql, 1, user="u_1")
    await add_grant(sql, 2, user="u_2")
    for number, grant in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 2)):
        await add_session(sql, number, grant=grant)
    first = await operations.oauth_sessions.get(session_id(1))
    assert (first["grant"], first["user"], first["tenant"], first["client"]) == (grant_id(1), "u_1", "acme", CLIENT)
    assert (first["client_name"], first["presented_as"], first["last_used_at"]) == ("Acme", CLIENT_ID, None)
    assert len(await operations.oauth_sessions.list_by_id("", 10)) == 5
    assert await operations.oauth_sessions.delete(session_id(1)) == {"id": session_id(1), "deleted": True}
    listed = await operations.oauth_sessions.list_by_id("", 10, user_id="u_1")
    assert [one["id"] for one in listed] == [session_id(2), session_id(3)]
    assert await operations.oauth_sessions.delete_many(user_id="u_1") == {"revoked": 2, "remaining": 0}
    assert await operations.oauth_sessions.delete_many() == {"revoked": 2, "remaining": 0}
    for missing in (operations.oauth_sessions.list_by_id("", 1, user_id="missing"),
                    operations.oauth_grants.list_by_id("", 1, user_id="missing"),
                    operations.oauth_sessions.delete_many(user_id="missing"),
                    operations.oauth_sessions.delete(session_id(1))):  # fmt: skip
        with pytest.raises(NotFound):
            await missing


async def test_what_one_request_cannot_end_remains(api: Api, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    await add_grant(sql, 1, user="u_1")
    await add_grant(sql, 2, user="u_1", resource=TEST_RESOURCE)
    await add_session(sql, 1)
    await add_session(sql, 2)
    monkeypatch.setattr("keyproxy.store.directory.oauth.sessions.REVOKED_MAX", 1)
    monkeypatch.setattr(grants, "REVOKED_MAX", 1)
    assert await api.directory.oauth_sessions.delete_many(user_id="u_1") == {"revoked": 1, "remaining": 1}
    assert await api.directory.oauth_grants.delete_of_user("u_1") == {"revoked": 1, "remaining": 1}
    assert await api.directory.oauth_grants.delete_of_user("u_1") == {"revoked": 1, "remaining": 0}


async def test_subject_has_one_user_until_it_is_unlinked(operations: DirectoryOperations, api: Api, sql: Sql) -> None:
    await api.user("u_2")
    linked = await operations.oauth_subjects.link("alice", "u_1")
    assert (linked["issuer"], linked["subject"], linked["user"], linked["tenant"]) == (IDP, "alice", "u_1", "acme")
    assert linked["created"] is True
    assert (await operations.oauth_subjects.link("alice", "u_1", issuer=IDP))["created"] is False
    with pytest.raises(Conflict, match="linked to user 'u_1'"):
        await operations.oauth_subjects.link("alice", "u_2")
    await operations.oauth_subjects.link("alice", "u_2", issuer="https://another.example")
    await operations.oauth_subjects.link("bob", "u_1")
    everyone = await operations.oauth_subjects.list_page(None, 2)
    assert [one["subject"] for one in everyone.items] == ["alice", "alice"]
    rest = await operations.oauth_subjects.list_page(everyone.next, 2)
    assert ([one["subject"] for one in rest.items], rest.next) == (["bob"], None)
    assert [one["subject"] for one in (await operations.oauth_subjects.list_page(None, 9, user_id="u_2")).items] == [
        "alice"
    ]
    await add_grant(sql, user="u_1")
    await sql.execute(
        "INSERT INTO keyproxy.oauth_sessions (id, grant_id, presented_as, scopes, via_issuer, via_subject, expires_at)"
        " VALUES ($1, $2, $3, '{}', $4, 'alice', now() + interval '1 day')",
        session_id(), grant_id(), CLIENT_ID, IDP,
    )  # fmt: skip
    assert (await operations.oauth_sessions.get(session_id()))["via_subject"] == "alice"
    unlinked = {"issuer": IDP, "subject": "alice", "deleted": True}
    assert await operations.oauth_subjects.unlink("alice") == unlinked
    with pytest.raises(NotFound):
        await operations.oauth_sessions.get(session_id())
    with pytest.raises(NotFound):
        await operations.oauth_subjects.unlink("alice")
    with pytest.raises(NotFound, match="no user"):
        await operations.oauth_subjects.link("carol", "missing")


async def test_without_a_configured_provider_the_issuer_is_required(database: Database) -> None:
    async with serving(database) as api:
        await api.user("u_1")
        with pytest.raises(Invalid, match=r"oauth\.login\.issuer"):
            await api.directory.oauth_subjects.link("alice", "u_1")


@pytest.mark.parametrize("cursor", ["", "x", "[]", '["a"]', '["a", 1]', "[" * 5000])
async def test_cursor_that_no_page_returned_is_refused(api: Api, cursor: str) -> None:
    with pytest.raises(Invalid, match="cursor"):
        await api.directory.oauth_subjects.list_page(cursor, 1)


async def test_token_of_a_tenant_manages_its_grants_sessions_and_subjects_and_no_client(api: Api, sql: Sql) -> None:
    await api.user("o_1", "other")
    await add_grant(sql, 1, user="u_1")
    await add_grant(sql, 2, user="o_1")
    await add_session(sql, 1, grant=1)
    await add_session(sql, 2, grant=2)
    await api.directory.oauth_subjects.link("alice", "o_1")
    bound = await api.token("oauth:read", "oauth:write", tenant="acme")
    calls: list[tuple[str, str, object]] = [
        ("GET", "/v1/oauth-clients", None),
        ("GET", f"/v1/oauth-clients/{CLIENT}", None),
        ("PATCH", f"/v1/oauth-clients/{CLIENT}", {"disabled": True}),
        ("DELETE", f"/v1/oauth-clients/{CLIENT}", None),
        ("POST", "/v1/oauth-clients", {"client_id": "w", "auth_method": "client_secret", "user": "u_1"}),
    ]
    for method, path, content in calls:
        reply = await api.call(method, path, content, token=bound)
        assert (reply.status, reply.code) == (403, "tenant_bound"), (method, path)
    for path in ("/v1/grants", "/v1/sessions"):
        (row,) = (await api.done("GET", path, token=bound))["items"]
        assert row["tenant"] == "acme"
    calls = [
        ("GET", "/v1/users/o_1/grants", None),
        ("GET", f"/v1/grants/{grant_id(2)}", None),
        ("PATCH", f"/v1/grants/{grant_id(2)}", {"plan": None}),
        ("DELETE", f"/v1/grants/{grant_id(2)}", None),
        ("POST", "/v1/grants/revoke", {"user": "o_1"}),
        ("GET", f"/v1/sessions/{session_id(2)}", None),
        ("DELETE", f"/v1/sessions/{session_id(2)}", None),
        ("POST", "/v1/sessions/revoke", {"user": "o_1"}),
        ("DELETE", "/v1/oauth-subjects?subject=alice", None),
        ("POST", "/v1/oauth-subjects", {"subject": "bob", "user": "o_1"}),
    ]
    for method, path, content in calls:
        reply = await api.call(method, path, content, token=bound)
        assert (reply.status, reply.code) == (404, "not_found"), (method, path)
    taken = await api.call("POST", "/v1/oauth-subjects", {"subject": "alice", "user": "u_1"}, token=bound)
    assert taken.code == "conflict"
    assert b"o_1" not in taken.body
    assert (await api.done("GET", "/v1/oauth-subjects", token=bound))["items"] == []
    revoked = await api.done("POST", "/v1/sessions/revoke", {"user": None}, token=bound)
    assert revoked == {"revoked": 1, "remaining": 0}
    assert await sql.fetchval("SELECT string_agg(id, ' ') FROM keyproxy.oauth_sessions") == session_id(2)


async def test_replay_of_a_registration_neither_repeats_it_nor_holds_the_secret(api: Api, sql: Sql) -> None:
    body = {"client_id": "worker", "auth_method": "client_secret", "user": "u_1"}
    key = {"Idempotency-Key": "once"}
    first = await api.call("POST", "/v1/oauth-clients", body, headers=key)
    second = await api.call("POST", "/v1/oauth-clients", body, headers=key)
    assert (first.status, second.status, second.headers["Idempotency-Replayed"]) == (201, 201, "true")
    assert first.headers["Location"] == f"/v1/oauth-clients/{row_id('worker')}"
    assert second.json == {**first.json, "secret": None}
    secret = first.json["secret"]
    stored = await sql.fetchval("SELECT string_agg(answer::text, '') FROM keyproxy.answered_requests")
    audited = await sql.fetchval("SELECT string_agg(to_jsonb(a)::text, '') FROM keyproxy.audit_log AS a")
    assert secret.rpartition("_")[2] not in stored + audited
    assert hashlib.sha256(secret.encode()).hexdigest() not in audited


async def test_change_with_an_outdated_etag_is_refused(api: Api, sql: Sql) -> None:
    await add_client(sql)
    shown = await api.call("GET", f"/v1/oauth-clients/{CLIENT}")
    match = {"If-Match": shown.headers["ETag"]}
    assert (await api.call("PATCH", f"/v1/oauth-clients/{CLIENT}", {"disabled": True}, headers=match)).status == 200
    assert (await api.call("PATCH", f"/v1/oauth-clients/{CLIENT}", {"disabled": False}, headers=match)).status == 412
    absent = await api.call("PATCH", "/v1/oauth-clients/https%3A%2F%2Fb.example%2Fc", {"disabled": True}, headers=match)
    assert absent.code == "not_found"


async def test_every_change_is_audited_with_its_actor(api: Api, sql: Sql) -> None:
    await add_grant(sql, user="u_1")
    await add_session(sql)
    await api.done("DELETE", f"/v1/sessions/{session_id()}")
    await api.done("DELETE", f"/v1/grants/{grant_id()}")
    await api.done("PATCH", f"/v1/oauth-clients/{CLIENT}", {"disabled": True})
    await api.done("POST", "/v1/oauth-subjects", {"subject": "alice", "user": "u_1"})
    for entity, action, tenant in (
        ("oauth_session", "delete", "acme"),
        ("oauth_grant", "delete", "acme"),
        ("oauth_client", "update", None),
        ("oauth_subject", "insert", "acme"),
    ):
        newest = (await api.audit(entity=entity))[0]
        assert (newest["action"], newest["actor"], newest["tenant"]) == (action, "token:file", tenant)


async def test_directory_of_a_tenant_refuses_clients(api: Api) -> None:
    bound = Directory(api.database, KeyFormat(), Actor("token:t", "host"), tenant_id="acme")
    with pytest.raises(Conflict, match="bound to tenant"):
        await bound.oauth_clients.create(WORKER)


@pytest.mark.parametrize("by", ["database", "api"])
async def test_commands_manage_clients_grants_sessions_and_subjects(
    api: Api, run: Run, sql: Sql, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYPROXY_OAUTH__RESOURCE", RESOURCE)
    monkeypatch.setenv("KEYPROXY_OAUTH__ISSUER", "https://mcp.example.com")
    monkeypatch.setenv("KEYPROXY_OAUTH__LOGIN__ISSUER", IDP)
    jwks = tmp_path / "jwks.json"
    jwks.write_text(json.dumps(JWKS))

    async def run_json(*arguments: str) -> Any:
        printed = await run("oauth", *arguments, "--json", by=by)
        assert printed.status == 0, printed.err
        return json.loads(printed.out)

    made = await run_json(
        "client", "create", "worker", "--user", "u_1", "--scope", "jobs:write", "--auth", "client_secret"
    )
    assert {"id", "client_id", "secret"} <= made.keys()
    assert re.fullmatch("kp_client_[0-9A-Za-z]{49}", made["secret"])
    signed = await run_json(
        "client", "create", "signer", "--user", "u_1", "--auth", "private_key_jwt", "--jwks-file", str(jwks)
    )
    assert signed["jwks"] == JWKS
    await run_json(
        "client", "create", "both", "--user", "u_1", "--auth", "tls", "--tls-subject", "dns:a.example", "--redirect-uri",
        "https://a.example/cb", "--redirect-uri", "http://127.0.0.1/cb",
    )  # fmt: skip
    assert {one["client_id"] for one in await run_json("client", "list")} == {"worker", "signer", "both"}
    assert (await run_json("client", "disable", VALUE_ID))["kind"] == "value"
    assert (await run_json("client", "enable", VALUE_ID))["disabled_at"] is None
    assert "secret" not in await run_json("client", "show", "worker")
    granted = await run_json("grant", "list", "--user", "u_1")
    assert {one["client_name"] for one in granted} == {"worker", "signer", "both"}
    await api.directory.plans.set("basic", {})
    assert (await run_json("grant", "set-plan", granted[0]["id"], "basic"))["plan"] == "basic"
    assert (await run_json("grant", "set-plan", granted[0]["id"], "--none"))["plan"] is None
    limited = await run_json("grant", "set-plan", "--user", "u_1", "basic")
    assert [(one["id"], one["plan"]) for one in limited] == [(one["id"], "basic") for one in granted]
    await run_json("grant", "set-plan", "--user", "u_1", "--none")
    await add_grant(sql, user="u_1")
    for number in (1, 2, 3):
        await add_session(sql, number)
    assert (
        len(await run_json("session", "list", "--user", "u_1")) == len(await run_json("session", "list", "--all")) == 3
    )
    assert (await run_json("session", "revoke", session_id(1)))["deleted"] is True
    asked = await run("oauth", "session", "revoke", "--user", "u_1", by=by)
    assert (asked.status, "--yes" in asked.err) == (1, True)
    assert await run_json("session", "revoke", "--user", "u_1", "--yes") == {"revoked": 2}
    assert await run_json("session", "revoke", "--all", "--yes") == {"revoked": 0}
    assert (await run_json("grant", "revoke", grant_id()))["deleted"] is True
    assert await run_json("grant", "revoke", "--user", "u_1", "--yes") == {"revoked": 3}
    assert (await run_json("subject", "link", "alice", "--user", "u_1"))["issuer" if by == "database" else "user"]
    assert [one["subject"] for one in await run_json("subject", "list", "--user", "u_1")] == ["alice"]
    assert (await run_json("subject", "unlink", "alice", "--issuer", IDP, "--yes"))["deleted"] is True
    assert (await run_json("client", "delete", "worker", "--yes"))["deleted"] is True


@pytest.mark.parametrize(
    "arguments",
    [
        ("client", "create", "worker"),
        ("client", "create", "worker", "--auth", "basic"),
        ("grant", "revoke"),
        ("grant", "revoke", "gra_1", "--user", "u_1"),
        ("session", "list", "--user", "u_1", "--all"),
        ("session", "revoke"),
        ("session", "revoke", "ses_1", "--all"),
        ("session", "revoke", "--user", "u_1", "--all"),
        ("grant", "set-plan", "gra_1"),
        ("grant", "set-plan", "--user", "u_1"),
        ("grant", "set-plan", "gra_1", "basic", "--user", "u_1"),
        ("grant", "set-plan", "--plan", "basic"),
        ("subject", "link", "alice"),
    ],
)
async def test_command_without_its_object_is_bad_usage(run: Run, arguments: tuple[str, ...]) -> None:
    assert (await run("oauth", *arguments)).status == 2


async def test_commands_do_not_quote_a_file_that_is_no_key_set(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text("-----BEGIN PRIVATE KEY-----\ncanary")
    create = ("oauth", "client", "create", "w", "--user", "u_1", "--auth", "private_key_jwt", "--jwks-file")
    for file in (str(path), str(tmp_path / "missing")):
        printed = await run(*create, file)
        assert printed.status == 1
        assert "canary" not in printed.err
