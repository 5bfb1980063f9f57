"""Registration over HTTP: nothing is stored, and every path to it responds alike."""

from __future__ import annotations

import pytest

from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, authorizing
from tests.store.harness import Sql

PROGRAM = {"client_name": "Acme", "redirect_uris": ["https://acme.example/cb"]}


async def test_same_program_gets_the_same_bytes_at_every_path_and_no_row(authority: Authority, sql: Sql) -> None:
    replies = [
        await authority.call("POST", path, content=PROGRAM, headers=headers)
        for path in ("/oauth/register", "/register")
        for headers in ({}, {"Content-Type": "application/json; charset=utf-8"}, {"Origin": "https://a.example"})
    ]
    assert {reply.status for reply in replies} == {201}
    assert len({reply.body for reply in replies}) == 1
    document = replies[0].json
    assert document["client_id"].startswith("kpc1_")
    assert document["redirect_uris"] == PROGRAM["redirect_uris"]
    assert document["token_endpoint_auth_method"] == "none"
    assert None not in document.values()
    assert "client_secret" not in document
    assert {reply.headers["Access-Control-Allow-Origin"] for reply in replies} == {"*"}
    assert {reply.headers["Cache-Control"] for reply in replies} == {"no-store"}
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_clients") == 0


@pytest.mark.parametrize(
    ("content", "status", "error"),
    [
        ({"client_name": "Acme"}, 400, "invalid_redirect_uri"),
        ({"redirect_uris": ["http://acme.example/cb"]}, 400, "invalid_redirect_uri"),
        ({"redirect_uris": ["javascript:alert(1)"]}, 400, "invalid_redirect_uri"),
        ([], 400, "invalid_client_metadata"),
        ({**PROGRAM, "client_name": "x" * 70_000}, 413, "invalid_request"),
    ],
)
async def test_refused_registration_names_the_error_of_the_protocol(
    authority: Authority, content: object, status: int, error: str
) -> None:
    reply = await authority.call("POST", "/oauth/register", content=content)
    assert (reply.status, reply.error) == (status, error)


async def test_registration_that_is_off_does_not_exist(database: Database) -> None:
    async with authorizing(database, registration="off") as authority:
        assert (await authority.call("POST", "/oauth/register", content=PROGRAM)).status == 404


async def test_twenty_registrations_of_an_address_are_accepted_at_once(authority: Authority) -> None:
    statuses = [(await authority.call("POST", "/oauth/register", content=PROGRAM)).status for _ in range(21)]
    assert statuses == [201] * 20 + [429]
