"""A user who signs in at an identity provider gets what the linked user may have; every other login ends in a page."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import asyncpg
import pytest
from jwt.algorithms import ECAlgorithm

from keyproxy.authorize.app import AuthorizationServer, RejectedConfig
from keyproxy.authorize.oidc.subject import ClaimsFault, Subject
from keyproxy.config.oauth.oauth_settings import OAuthLogin, OAuthSettings
from keyproxy.config.schema import Settings
from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, Reply, authorizing
from tests.authorize.oidc.browser import CLIENT_ID as PROGRAM_ID
from tests.authorize.oidc.browser import Browser, query
from tests.authorize.oidc.idp import CLIENT_ID, CLIENT_SECRET, Idp, running_idp
from tests.signing.test_id_tokens import encoded

Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

LINK = "INSERT INTO keyproxy.oauth_subjects (issuer, subject, user_id) VALUES ($1, $2, $3)"
CREATES: Final[Mapping[str, Any]] = {
    "provision": "create", "tenant_claim": "org", "tenants": {"acme.example": "acme", "gone": "nowhere"},
}  # fmt: skip
#: The rows that a login without consent must not leave behind.
ROWS = "SELECT (SELECT count(*) FROM keyproxy.oauth_codes) + (SELECT count(*) FROM keyproxy.oauth_grants)"


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[Sql]:
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


@contextlib.asynccontextmanager
async def signing_in(
    database: Database, idp: Idp | None = None, **login: Any
) -> AsyncIterator[tuple[Authority, Idp, Browser]]:
    """An authorization server whose users sign in at a provider, with the user u_42 of acme."""
    async with running_idp(idp) as provider:
        settings = OAuthLogin(kind="oidc", issuer=provider.issuer, client_id=CLIENT_ID, **login)
        async with authorizing(database, login=settings, login_secret=CLIENT_SECRET) as authority:
            await authority.user()
            yield authority, provider, Browser(authority)


async def linked(sql: Sql, idp: Idp, user: str = "u_42", subject: str = "s-1") -> None:
    await sql.execute(LINK, idp.issuer, subject, user)


async def returned(idp: Idp, browser: Browser, **changed: str | None) -> Reply:
    """Sign in at the provider."""
    location = (await browser.begin()).headers["Location"]
    idp.code(location)
    return await browser.return_with(location, changed=changed)


async def test_linked_subject_gets_tokens_of_its_user(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (authority, idp, browser):
        await linked(sql, idp)
        begun = await browser.begin()
        assert (begun.status, begun.headers["Location"].split("?")[0]) == (302, f"{idp.issuer}/auth")
        asked = query(begun.headers["Location"])
        assert asked["scope"] == "openid"  # those of the client stay here, as the resource does
        assert (asked["code_challenge_method"], "resource" in asked) == ("S256", False)
        assert "." not in asked["state"]  # a ticket is readable; the provider gets it encrypted
        idp.code(begun.headers["Location"])
        page = await browser.return_with(begun.headers["Location"])
        tokens = await browser.exchange(await browser.decide(page))
        assert (tokens.status, tokens.json["scope"]) == (200, "jobs:write")
        row = await sql.fetchrow(
            "SELECT g.user_id, s.via_issuer, s.via_subject, s.via_key FROM keyproxy.oauth_sessions AS s"
            " JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id"
        )
        assert row is not None
        assert tuple(row) == ("u_42", idp.issuer, "s-1", None)
        assert sum(authority.counts.login_seconds.counts) == 1
        log = json.dumps(authority.log)
        hidden = (asked["state"], asked["nonce"], "code-1", CLIENT_SECRET, tokens.json["access_token"])
        assert not [one for one in hidden if one in log]
        assert [line["user"] for line in authority.log if line["route"] == "/oauth/callback"] == ["u_42"]


async def test_unlinked_subject_sees_its_values_and_gets_no_code(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (_authority, idp, browser):
        # Neither an e-mail nor a name identifies a user.
        idp.claims = {"sub": "s<9>", "email": "u_42", "email_verified": True, "preferred_username": "u_42"}
        page = await returned(idp, browser)
        assert (page.status, "Location" in page.headers) == (403, False)
        assert idp.issuer in page.text
        assert "s&lt;9&gt;" in page.text
        assert await sql.fetchval(ROWS) == 0
        await linked(sql, idp, subject="s<9>")
        assert (await returned(idp, browser)).status == 200


async def test_user_is_created_once_in_the_mapped_tenant(database: Database, sql: Sql) -> None:
    async with signing_in(database, **CREATES) as (authority, idp, browser):
        idp.claims = {"org": "acme.example"}
        browsers = [browser.other() for _ in range(8)]
        locations = [(await one.begin()).headers["Location"] for one in browsers]
        for number, location in enumerate(locations):
            idp.code(location, f"code-{number}")
        replies = await asyncio.gather(
            *(
                one.return_with(location, code=f"code-{number}")
                for number, (one, location) in enumerate(zip(browsers, locations, strict=True))
            )
        )
        assert {reply.status for reply in replies} == {200}
        rows = await sql.fetch("SELECT id, tenant_id FROM keyproxy.users WHERE id <> 'u_42'")
        expected = Subject(idp.issuer, "s-1").created_user_id
        assert [tuple(row) for row in rows] == [(expected, "acme")]
        assert await sql.fetchval("SELECT user_id FROM keyproxy.oauth_subjects") == expected
        created = "SELECT actor FROM keyproxy.audit_log WHERE entity_id = $1 AND action = 'insert'"
        assert await sql.fetchval(created, expected) == f"user:{expected}"

        await authority.directory.users.change(expected, {"disabled": True})
        assert (await returned(idp, browser)).status == 403


async def test_user_of_an_organisation_without_a_tenant_is_not_created(database: Database, sql: Sql) -> None:
    async with signing_in(database, **CREATES) as (_authority, idp, browser):
        for org in (None, "other.example", "gone", ["acme.example"], 7, ""):
            idp.claims = {"org": org}
            page = await returned(idp, browser)
            assert (page.status, "Location" in page.headers, org) == (403, False, org)
        assert await sql.fetchval("SELECT count(*) FROM keyproxy.users") == 1


async def test_created_user_loses_access_with_its_organisation_and_a_linked_one_does_not(
    database: Database, sql: Sql
) -> None:
    async with signing_in(database, **CREATES) as (_authority, idp, browser):
        await linked(sql, idp, subject="by-hand")
        idp.claims = {"org": "acme.example", "sub": "s-1"}
        assert (await returned(idp, browser)).status == 200
        idp.claims = {"org": "other.example", "sub": "s-1"}
        assert (await returned(idp, browser)).status == 403
        idp.claims = {"org": "other.example", "sub": "by-hand"}
        assert (await returned(idp, browser)).status == 200


async def test_user_of_a_disabled_tenant_does_not_sign_in(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (authority, idp, browser):
        await linked(sql, idp)
        await authority.directory.tenants.change("acme", {"disabled": True})
        assert (await returned(idp, browser)).status == 403


def _hs256_with_the_public_key(header: dict[str, Any], claims: dict[str, Any], key: Any) -> str:
    public = json.dumps(ECAlgorithm.to_jwk(key.public_key(), as_dict=True)).encode()
    message = f"{encoded(json.dumps({**header, 'alg': 'HS256'}).encode())}.{encoded(json.dumps(claims).encode())}"
    return f"{message}.{encoded(hmac.digest(public, message.encode(), hashlib.sha256))}"


def _unsigned(header: dict[str, Any], claims: dict[str, Any], _key: Any) -> str:
    return f"{encoded(json.dumps({**header, 'alg': 'none'}).encode())}.{encoded(json.dumps(claims).encode())}."


HOSTILE: Final[Sequence[Mapping[str, Any]]] = (
    {"sign": _hs256_with_the_public_key},
    {"sign": _unsigned},
    {"claims": {"iss": "https://evil.example"}},
    {"claims": {"aud": "another-client"}},
    {"claims": {"azp": "another-client"}},
    {"claims": {"nonce": "of-another-login"}},
    {"claims": {"exp": 1_000_000_000}},
    {"claims": {"sub": None}},
    {"headers": {"kid": "forged"}},
)


async def test_invalid_id_token_ends_in_a_page_without_a_code(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (_authority, idp, browser):
        await linked(sql, idp)
        location = (await browser.begin()).headers["Location"]
        for hostile in HOSTILE:
            idp.claims, idp.headers, idp.sign = {}, {}, None
            for name, value in hostile.items():
                setattr(idp, name, value)
            idp.code(location)
            page = await browser.return_with(location)
            assert (page.status, "Location" in page.headers, hostile) == (403, False, hostile)
            assert 'role="alert"' in page.text
        assert idp.requests["/token"] == len(HOSTILE)
        assert await sql.fetchval(ROWS) == 0


#: Parameters of a response that is not the provider's, and the status of the page; None: the parameter is missing.
FOREIGN: Final[Sequence[tuple[Mapping[str, str | None], int]]] = (
    ({"iss": None}, 403),
    ({"iss": "https://evil.example"}, 403),
    ({"code": "another"}, 403),
    ({"code": None}, 400),
    ({"code": None, "error": "access_denied"}, 403),
    ({"error": "login_required"}, 403),
    ({"state": None}, 400),
    ({"state": "altered"}, 400),
)


async def test_response_that_is_not_the_providers_ends_in_a_page_without_a_code(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (_authority, idp, browser):
        await linked(sql, idp)
        location = (await browser.begin()).headers["Location"]
        idp.code(location)
        for changed, status in FOREIGN:
            page = await browser.return_with(location, changed=changed)
            assert (page.status, "Location" in page.headers, changed) == (status, False, changed)
        assert await sql.fetchval(ROWS) == 0
        assert (await browser.return_with(location)).status == 200


async def test_login_continues_only_in_its_browser_and_within_its_time(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (authority, idp, browser):
        await linked(sql, idp)
        location = (await browser.begin()).headers["Location"]
        idp.code(location)
        stranger = browser.other()
        assert (await stranger.return_with(location)).status == 403  # without a cookie
        await stranger.begin()
        assert (await stranger.return_with(location)).status == 403  # with another one
        twice = [("state", query(location)["state"]), ("code", "code-1"), ("code", "code-2")]
        assert (await browser.call("GET", "/oauth/callback", query=twice)).status == 400
        assert idp.requests["/token"] == 0
        page = await browser.return_with(location)
        assert page.status == 200
        assert (await browser.return_with(location)).status == 403  # the provider has redeemed the code
        ticket = page.text.partition('name="ticket" value="')[2].partition('"')[0]
        assert (await browser.return_with(location, changed={"state": ticket})).status == 400  # that of the consent
        authority.clock.advance(600)
        assert (await browser.return_with(location)).status == 400


async def test_code_of_another_login_is_refused_by_the_verifier_of_this_one(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (_authority, idp, browser):
        await linked(sql, idp)
        victims = (await browser.begin()).headers["Location"]
        idp.code(victims, "stolen")
        thief = browser.other()
        own = (await thief.begin()).headers["Location"]
        assert (await thief.return_with(own, code="stolen")).status == 403


async def test_outage_of_the_provider_is_a_page_to_try_again(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (authority, idp, browser):
        await linked(sql, idp)
        idp.status = 503
        begun = await browser.begin()
        assert (begun.status, "Location" in begun.headers) == (503, False)
        assert int(begun.headers["Retry-After"]) > 0
        idp.status = None
        authority.clock.advance(1)
        location = (await browser.begin()).headers["Location"]
        idp.code(location)
        idp.status = 500
        page = await browser.return_with(location)
        assert (page.status, "Retry-After" in page.headers) == (503, True)
        idp.status = None
        assert (await browser.return_with(location)).status == 200  # nothing is consumed


async def test_failed_logins_are_slowed(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (_authority, idp, browser):
        await linked(sql, idp)
        location = (await browser.begin()).headers["Location"]
        statuses = [(await browser.return_with(location, code="guess")).status for _ in range(11)]
        assert statuses == [403] * 10 + [429]


async def test_another_account_can_be_used(database: Database) -> None:
    async with signing_in(database) as (_authority, idp, browser):
        assert "prompt" not in query((await browser.begin()).headers["Location"])
        assert query((await browser.begin(prompt="login")).headers["Location"])["prompt"] == "select_account"
        idp.metadata = {"prompt_values_supported": ["none", "login"]}
    async with signing_in(database, Idp(metadata={"prompt_values_supported": ["login"]})) as (_, idp, browser):
        assert query((await browser.begin(prompt="login")).headers["Location"])["prompt"] == "login"


async def test_long_state_of_a_client_passes_through_the_provider_or_is_refused_at_once(
    database: Database, sql: Sql
) -> None:
    async with signing_in(database) as (_authority, idp, browser):
        await linked(sql, idp)
        state = secrets.token_hex(3_000)
        location = (await browser.begin(state=state)).headers["Location"]
        idp.code(location, "c" * 2_000)
        consented = await browser.decide(await browser.return_with(location, code="c" * 2_000))
        assert consented.location.query["state"] == state
        assert (await browser.begin(state=secrets.token_hex(7_000))).status == 400


async def test_page_of_the_user_opens_after_the_login(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (_authority, idp, browser):
        await linked(sql, idp)
        location = (await browser.call("GET", "/oauth/connections")).headers["Location"]
        idp.code(location)
        opened = await browser.return_with(location)
        assert (opened.status, opened.headers["Location"]) == (303, "/oauth/connections")
        assert (await browser.call("GET", "/oauth/connections")).status == 200


@pytest.mark.parametrize(
    ("claims", "names", "subject"),
    [
        ({"sub": "a|b"}, ["sub"], "a|b"),
        ({"tid": "t", "oid": "o"}, ["tid", "oid"], "t|o"),
        ({"tid": "t|o", "oid": "x"}, ["tid", "oid"], None),
        ({"tid": "t"}, ["tid", "oid"], None),
        ({"sub": 7}, ["sub"], None),
        ({"sub": ["a"]}, ["sub"], None),
        ({"sub": "a\0b"}, ["sub"], None),
        ({"sub": "a\u202eb"}, ["sub"], None),
        ({"sub": "x" * 255}, ["sub"], "x" * 255),
        ({"sub": "x" * 256}, ["sub"], None),
    ],
)
def test_subject_is_named_by_the_configured_claims_alone(
    claims: dict[str, Any], names: list[str], subject: str | None
) -> None:
    login = OAuthLogin(issuer="https://idp.example", subject_claims=names)
    try:
        found = Subject.of(claims, login).subject
    except ClaimsFault:
        found = None
    assert found == subject


def test_created_user_id_depends_on_issuer_and_subject() -> None:
    ids = {Subject(issuer, subject).created_user_id for issuer in ("https://a", "https://b") for subject in ("1", "2")}
    assert len(ids) == 4
    assert {len(one) for one in ids} == {26}
    assert all(one.startswith("usr_") and one[4:].isalnum() for one in ids)


async def test_subject_that_is_unlinked_before_the_decision_gets_no_code(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (_authority, idp, browser):
        await linked(sql, idp)
        page = await returned(idp, browser)
        await sql.execute("DELETE FROM keyproxy.oauth_subjects")
        decided = await browser.decide(page)
        assert (decided.status, "Location" in decided.headers) == (403, False)
        assert await sql.fetchval(ROWS) == 0


async def test_unlinking_a_subject_ends_the_sessions_that_it_has_opened(database: Database, sql: Sql) -> None:
    async with signing_in(database) as (authority, idp, browser):
        await linked(sql, idp)
        tokens = await browser.exchange(await browser.decide(await returned(idp, browser)))
        await sql.execute("DELETE FROM keyproxy.oauth_subjects")
        form = {
            "grant_type": "refresh_token", "refresh_token": tokens.json["refresh_token"], "client_id": PROGRAM_ID,
        }  # fmt: skip
        assert (await authority.call("POST", "/oauth/token", form=form)).error == "invalid_grant"
        assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_access_tokens") == 0


@pytest.mark.parametrize("content", [None, b"", b" \n", "é".encode()])
def test_server_does_not_start_without_the_secret_that_it_needs_at_the_provider(
    tmp_path: Path, content: bytes | None
) -> None:
    (tmp_path / "oauth").write_bytes(b"s" * 32)
    if content is not None:
        (tmp_path / "idp").write_bytes(content)
    oauth = OAuthSettings(
        issuer="http://127.0.0.1:1", resource="http://127.0.0.1:1/mcp", secret_file=str(tmp_path / "oauth")
    )
    login = OAuthLogin(
        kind="oidc", issuer="https://idp.example", client_id="c", client_secret_file=str(tmp_path / "idp")
    )
    with pytest.raises(RejectedConfig, match=r"oauth\.login\.client_secret_file"):
        AuthorizationServer(Settings(oauth=oauth, oauth_login=login), "postgresql:///none")
