"""The token endpoint: grants for tokens, and the response to each fault."""

from __future__ import annotations

import json

from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.oauth.oauth_settings import KnownClientRow
from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, authorizing
from tests.authorize.tokens.token_requests import (
    SECRET,
    WORKER,
    add_service,
    basic,
    code_form,
    new_code,
    refresh_form,
    token,
)
from tests.store.conftest import relay, short_directory  # noqa: F401 - fixtures
from tests.store.harness import Relay, Sql
from tests.store.oauth_rows import CLIENT, RESOURCE, TEST_RESOURCE, add_client, add_grant

SERVICE = {"grant_type": "client_credentials"}


async def test_code_is_exchanged_for_tokens(authority: Authority, sql: Sql) -> None:
    reply = await token(authority, code_form(await new_code(sql)))
    assert reply.status == 200
    access, refresh = reply.json["access_token"], reply.json["refresh_token"]
    assert KeyFormat().may_be_access_token(access.encode())
    assert KeyFormat().may_be_refresh_token(refresh.encode())
    assert reply.json == {
        "access_token": access, "token_type": "Bearer", "expires_in": 900, "refresh_token": refresh,
        "scope": "jobs:write",
    }  # fmt: skip
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["Cache-Control"] == "no-store"
    assert reply.headers["Access-Control-Allow-Origin"] == "*"


async def test_refresh_token_is_exchanged_for_its_successor(authority: Authority, sql: Sql) -> None:
    first = await token(authority, code_form(await new_code(sql)))
    second = await token(authority, refresh_form(first, resource=RESOURCE))
    assert (second.status, second.json["scope"]) == (200, "jobs:write")
    assert second.json["refresh_token"] != first.json["refresh_token"]


async def test_tokens_without_scopes_name_none(authority: Authority, sql: Sql) -> None:
    """RFC 6749 has no empty list of scopes."""
    reply = await token(authority, code_form(await new_code(sql, scopes=())))
    assert (reply.status, "scope" in reply.json) == (200, False)


async def test_alias_serves_the_same_endpoint(authority: Authority, sql: Sql) -> None:
    reply = await authority.call("POST", "/token", form=code_form(await new_code(sql)))
    assert reply.status == 200


#: Changes of a good request, and the response.
FAULTS: list[tuple[dict[str, str], int, str]] = [
    ({"grant_type": ""}, 400, "invalid_request"),
    ({"grant_type": "password"}, 400, "unsupported_grant_type"),
    ({"grant_type": "password", "client_id": ""}, 400, "unsupported_grant_type"),
    ({"grant_type": "urn:ietf:params:oauth:grant-type:device_code"}, 400, "unsupported_grant_type"),
    ({"grant_type": "client_credentials"}, 400, "unauthorized_client"),
    ({"code": ""}, 400, "invalid_request"),
    ({"code": "x" * 43}, 400, "invalid_grant"),
    ({"code_verifier": ""}, 400, "invalid_request"),
    ({"code_verifier": "w" * 43}, 400, "invalid_grant"),
    ({"code_verifier": "v" * 42}, 400, "invalid_grant"),
    ({"code_verifier": "v" * 129}, 400, "invalid_grant"),
    ({"redirect_uri": "https://acme.example/other"}, 400, "invalid_grant"),
    ({"resource": "https://elsewhere.example"}, 400, "invalid_target"),
    ({"client_id": ""}, 401, "invalid_client"),
    ({"client_id": "unknown"}, 401, "invalid_client"),
    ({"client_id": "https://other.example/client"}, 400, "invalid_grant"),
    ({"client_secret": "s", "client_assertion": "a.b.c"}, 400, "invalid_request"),
]


async def test_faulty_requests_are_refused_and_leave_the_code_good(authority: Authority, sql: Sql) -> None:
    good = await new_code(sql, expires="'infinity'")
    for changes, status, code in FAULTS:
        reply = await token(authority, code_form(good, **changes))
        assert (reply.status, reply.error) == (status, code), changes
        assert set(reply.json) == {"error", "error_description"}
        assert reply.headers["Cache-Control"] == "no-store"
        authority.clock.advance(6)  # for the limit of failures
    assert (await token(authority, code_form(good))).status == 200


async def test_malformed_request_is_invalid(authority: Authority) -> None:
    repeated = [("grant_type", "refresh_token"), ("grant_type", "refresh_token")]
    replies = [
        await authority.call("POST", "/oauth/token?client_id=x", form=code_form("x")),
        await authority.call("POST", "/oauth/token", form=repeated),
        await authority.call("POST", "/oauth/token", content=code_form("x")),
    ]
    assert [(reply.status, reply.error) for reply in replies] == [(400, "invalid_request")] * 3


async def test_downgrade_to_a_plain_challenge_is_impossible(authority: Authority, sql: Sql) -> None:
    code = await new_code(sql)
    challenge = "v" * 43  # as if the verifier were the challenge itself
    await sql.execute("UPDATE keyproxy.oauth_codes SET challenge = $1", challenge.encode()[:32])
    assert (await token(authority, code_form(code, code_verifier=challenge))).error == "invalid_grant"


async def test_replayed_code_ends_its_session(authority: Authority, sql: Sql) -> None:
    code = await new_code(sql)
    first = await token(authority, code_form(code))
    again = await token(authority, code_form(code))
    assert (again.status, again.error) == (400, "invalid_grant")
    assert (await token(authority, refresh_form(first))).error == "invalid_grant"
    assert authority.counts.sessions_ended["replay"] == 1


async def test_stolen_refresh_token_ends_the_session_once_it_is_used_again(authority: Authority, sql: Sql) -> None:
    stolen = await token(authority, code_form(await new_code(sql)))
    mine = await token(authority, refresh_form(stolen))
    mine = await token(authority, refresh_form(mine))
    authority.clock.advance(61)
    thief = await token(authority, refresh_form(stolen))
    assert (thief.status, thief.error) == (400, "invalid_grant")
    assert (await token(authority, refresh_form(mine))).error == "invalid_grant"
    assert authority.counts.sessions_ended["reuse"] == 1


async def test_refresh_of_a_disabled_account_is_refused_and_counted(authority: Authority, sql: Sql) -> None:
    first = await token(authority, code_form(await new_code(sql)))
    await sql.execute("UPDATE keyproxy.users SET disabled_at = now()")
    refused = await token(authority, refresh_form(first))
    assert (refused.status, refused.error) == (400, "invalid_grant")
    assert authority.counts.sessions_ended["disabled"] == 1
    await sql.execute("UPDATE keyproxy.users SET disabled_at = NULL")
    assert (await token(authority, refresh_form(first))).status == 200


#: Header and further parameters of a service's request, and the response.
SERVICE_REQUESTS: list[tuple[dict[str, str], dict[str, str], int, str]] = [
    (basic(), {}, 200, ""),
    ({}, {"client_id": WORKER, "client_secret": SECRET.reveal().decode()}, 200, ""),
    (basic(), {"client_id": WORKER}, 200, ""),
    (basic(secret="wrong"), {}, 401, "invalid_client"),
    ({}, {"client_id": WORKER, "client_secret": "wrong"}, 401, "invalid_client"),
    ({}, {"client_id": WORKER}, 401, "invalid_client"),
    (basic(), {"client_id": WORKER, "client_secret": "x"}, 400, "invalid_request"),
    (basic(), {"scope": "jobs:write jobs:delete"}, 200, ""),
    (basic(), {"scope": "jobs:delete"}, 400, "invalid_scope"),
    (basic(), {"resource": TEST_RESOURCE}, 400, "invalid_target"),
]


async def test_service_gets_a_token_for_its_secret(authority: Authority, sql: Sql) -> None:
    await add_service(sql)
    for headers, form, status, code in SERVICE_REQUESTS:
        reply = await token(authority, SERVICE | form, headers=headers)
        assert (reply.status, reply.error) == (status, code), (headers, form)
        if status == 200:
            assert reply.json.keys() == {"access_token", "token_type", "expires_in", "scope"}
            assert reply.json["scope"] == "jobs:write"
        assert ("WWW-Authenticate" in reply.headers) is (status == 401 and bool(headers))


async def test_code_of_a_listed_client_does_not_authenticate_a_service_with_the_same_id(
    database: Database, sql: Sql
) -> None:
    """A listed client may present any id, also one that an operator registers later."""
    known = (KnownClientRow("Acme", ["https://acme.example/cb"]),)
    async with authorizing(database, resource=RESOURCE, known_clients=known) as authority:
        await add_client(sql, "listed:Acme", "listed")
        await add_grant(sql, client_id="listed:Acme")
        await add_service(sql)
        own, foreign = await new_code(sql, 2, grant=9), await new_code(sql)
        await sql.execute("UPDATE keyproxy.oauth_codes SET client_id = $1", WORKER)
        issued = await token(authority, code_form(own, client_id=""), headers=basic())
        stolen = refresh_form(issued, client_id=WORKER)
        for form in (stolen, stolen | {"code": foreign}):
            assert (await token(authority, form)).error == "invalid_client"
        assert (await token(authority, stolen, headers=basic())).status == 200


async def test_disabled_service_gets_no_token(authority: Authority, sql: Sql) -> None:
    await add_service(sql)
    await sql.execute("UPDATE keyproxy.oauth_clients SET disabled_at = now()")
    reply = await token(authority, SERVICE, headers=basic())
    assert (reply.status, reply.error) == (401, "invalid_client")


async def test_outage_is_temporary_and_consumes_nothing(
    relay: Relay,  # noqa: F811 - the fixture
    sql: Sql,
) -> None:
    database = Database(relay.dsn, pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    async with authorizing(database, resource=RESOURCE, test_resource=TEST_RESOURCE) as authority:
        code = await new_code(sql)
        await relay.cut()
        reply = await token(authority, code_form(code))
        assert (reply.status, reply.error) == (503, "temporarily_unavailable")
        assert int(reply.headers["Retry-After"]) > 0
        await relay.mend()
        assert (await token(authority, code_form(code))).status == 200
    await database.close()


async def test_log_and_metrics_name_grant_client_and_user_and_no_secret(authority: Authority, sql: Sql) -> None:
    code = await new_code(sql)
    reply = await token(authority, code_form(code))
    await token(authority, refresh_form(reply))
    first, second = authority.log
    assert (first["grant_type"], first["client"], first["user"]) == ("authorization_code", CLIENT, "u_42")
    assert second["grant_type"] == "refresh_token"
    logged = json.dumps(authority.log)
    for secret in (code, reply.json["access_token"], reply.json["refresh_token"]):
        assert secret not in logged
    assert authority.counts.tokens_issued == {
        "authorization_code": 1, "refresh_token": 1, "client_credentials": 0,
    }  # fmt: skip
    assert authority.counts.requests["token", "ok"] == 2
