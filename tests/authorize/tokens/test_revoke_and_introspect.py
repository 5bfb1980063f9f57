"""Revocation and introspection over HTTP: authenticated clients, their own tokens, and tokens of the admin API."""

from __future__ import annotations

import base64
from typing import Any

from keyproxy.auth.api_key import KeyFormat
from tests.authorize.authority import Authority, Reply
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
from tests.store.harness import Sql
from tests.store.oauth_rows import CLIENT_ID, RESOURCE

SERVICE = {"grant_type": "client_credentials"}
ADMIN = KeyFormat().make_admin_token(bytes(32))


async def revoke(authority: Authority, form: dict[str, str], **changes: Any) -> Reply:
    return await authority.call("POST", "/oauth/revoke", form=form, **changes)


async def introspect(authority: Authority, text: str, **changes: Any) -> Reply:
    return await authority.call("POST", "/oauth/introspect", form={"token": text}, **changes)


async def admin_token(sql: Sql, scopes: list[str], tenant: str | None = None) -> dict[str, str]:
    """Insert a token of the admin API. Its header."""
    await sql.execute(
        "INSERT INTO keyproxy.admin_tokens (id, digest, hint, name, scopes, tenant_id)"
        " VALUES ('tok_1', $1, 'kp_admin_…', 'test', $2, $3)",
        ADMIN.digest(), scopes, tenant,
    )  # fmt: skip
    return {"Authorization": f"Bearer {ADMIN.reveal().decode()}"}


async def test_revoked_refresh_token_ends_the_session(authority: Authority, sql: Sql) -> None:
    issued = await token(authority, code_form(await new_code(sql)))
    reply = await revoke(authority, {"token": issued.json["refresh_token"], "client_id": CLIENT_ID})
    assert (reply.status, reply.json, reply.headers["Cache-Control"]) == (200, {}, "no-store")
    assert reply.headers["Access-Control-Allow-Origin"] == "*"
    assert (await token(authority, refresh_form(issued))).error == "invalid_grant"
    assert authority.counts.sessions_ended["revoked"] == 1


async def test_revoked_access_token_leaves_the_session(authority: Authority, sql: Sql) -> None:
    issued = await token(authority, code_form(await new_code(sql)))
    form = {"token": issued.json["access_token"], "client_id": CLIENT_ID, "token_type_hint": "refresh_token"}
    assert (await revoke(authority, form)).status == 200
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_access_tokens") == 0
    assert (await token(authority, refresh_form(issued))).status == 200


async def test_another_clients_token_is_not_revoked_and_the_response_is_the_same(
    authority: Authority, sql: Sql
) -> None:
    issued = await token(authority, code_form(await new_code(sql)))
    for text in (issued.json["access_token"], issued.json["refresh_token"], "x"):
        reply = await revoke(authority, {"token": text, "client_id": "https://other.example/client"})
        assert (reply.status, reply.body) == (200, b"{}")
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_access_tokens") == 1


async def test_revocation_needs_a_token_and_a_client(authority: Authority) -> None:
    faults: list[tuple[dict[str, str], int, str]] = [
        ({"client_id": CLIENT_ID}, 400, "invalid_request"),
        ({"token": "x"}, 401, "invalid_client"),
        ({"token": "x", "client_id": "unknown"}, 401, "invalid_client"),
    ]
    for form, status, code in faults:
        reply = await revoke(authority, form)
        assert (reply.status, reply.error) == (status, code)


async def test_confidential_client_sees_its_own_access_token(authority: Authority, sql: Sql) -> None:
    await add_service(sql)
    text = (await token(authority, SERVICE, headers=basic())).json["access_token"]
    reply = await introspect(authority, text, headers=basic())
    assert (reply.status, reply.headers["Cache-Control"]) == (200, "no-store")
    assert "Access-Control-Allow-Origin" not in reply.headers
    shown = reply.json
    assert shown.pop("exp") - shown.pop("iat") == 900
    assert shown == {
        "active": True, "scope": "jobs:write", "client_id": WORKER, "sub": "u_42", "iss": authority.url,
        "aud": RESOURCE, "token_type": "Bearer",
    }  # fmt: skip


async def test_bound_token_is_shown_with_the_thumbprint_of_its_certificate(authority: Authority, sql: Sql) -> None:
    await add_service(sql)
    text = (await token(authority, SERVICE, headers=basic())).json["access_token"]
    await sql.execute("UPDATE keyproxy.oauth_access_tokens SET bound_to = $1", bytes(range(32)))
    shown = (await introspect(authority, text, headers=basic())).json
    thumbprint = base64.urlsafe_b64encode(bytes(range(32))).rstrip(b"=").decode()
    assert shown["cnf"] == {"x5t#S256": thumbprint}


async def test_token_of_another_client_is_inactive(authority: Authority, sql: Sql) -> None:
    await add_service(sql)
    issued = await token(authority, code_form(await new_code(sql)))
    for text in (issued.json["access_token"], issued.json["refresh_token"], "x"):
        assert (await introspect(authority, text, headers=basic())).json == {"active": False}


#: Further parameters and the header of requests that may not introspect.
OTHERS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "public": ({"client_id": CLIENT_ID}, {}),
    "public by Basic": ({}, basic(CLIENT_ID, "x")),
    "nothing": ({}, {}),
    "wrong secret": ({"client_id": WORKER, "client_secret": "wrong"}, {}),
    "wrong Basic": ({}, basic(secret="wrong")),
    "unknown admin token": ({}, {"Authorization": f"Bearer {ADMIN.reveal().decode()}"}),
    "client secret as bearer": ({}, {"Authorization": f"Bearer {SECRET.reveal().decode()}"}),
}


async def test_others_may_not_introspect(authority: Authority, sql: Sql) -> None:
    await add_service(sql)
    issued = await token(authority, code_form(await new_code(sql)))
    for name, (form, headers) in OTHERS.items():
        form = {"token": issued.json["access_token"]} | form
        reply = await authority.call("POST", "/oauth/introspect", form=form, headers=headers)
        assert reply.status == 401, name
        assert ("WWW-Authenticate" in reply.headers) is bool(headers), name


async def test_admin_token_sees_the_tokens_that_it_may_read(authority: Authority, sql: Sql) -> None:
    issued = await token(authority, code_form(await new_code(sql)))
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ('globex')")
    headers = await admin_token(sql, ["tokens:read"])
    readers: list[tuple[list[str], str | None, int, bool | None]] = [
        (["tokens:read"], None, 200, True),
        (["tokens:read"], "acme", 200, True),
        (["tokens:read"], "globex", 200, False),
        (["admin:read"], None, 200, True),
        (["keys:read"], None, 401, None),
    ]
    for scopes, tenant, status, is_active in readers:
        await sql.execute("UPDATE keyproxy.admin_tokens SET scopes = $1, tenant_id = $2", scopes, tenant)
        reply = await introspect(authority, issued.json["access_token"], headers=headers)
        assert (reply.status, reply.json.get("active")) == (status, is_active), (scopes, tenant)


async def test_admin_token_that_does_not_work_may_not_introspect(authority: Authority, sql: Sql) -> None:
    headers = await admin_token(sql, ["tokens:read"])
    for change in ("expires_at = now() - interval '1 s'", "revoked_at = now()"):
        await sql.execute(f"UPDATE keyproxy.admin_tokens SET {change}")
        assert (await introspect(authority, "x", headers=headers)).status == 401


async def test_admin_token_with_the_credential_of_a_client_is_refused(authority: Authority, sql: Sql) -> None:
    headers = await admin_token(sql, ["tokens:read"])
    form = {"token": "x", "client_id": WORKER, "client_secret": SECRET.reveal().decode()}
    reply = await authority.call("POST", "/oauth/introspect", form=form, headers=headers)
    assert (reply.status, reply.error) == (400, "invalid_request")
