"""What is read from an OpenID provider, when, and how often; an outage delays logins and ends nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest
import trustme
from aiohttp import web

from keyproxy.authorize.oidc import provider
from keyproxy.authorize.oidc.provider import IdentityProvider, LoginFault
from keyproxy.authorize.oidc.provider_metadata import ProviderUnavailable
from keyproxy.config.oauth.oauth_settings import OAuthLogin
from keyproxy.model import Moment
from keyproxy.platform import clock
from tests.authorize.oidc.idp import CLIENT_ID, CLIENT_SECRET, Idp, running_idp
from tests.waiting import until

REDIRECT = "http://127.0.0.1:9/oauth/callback"
VERIFIER, CHALLENGE = "v" * 43, "7w_YNF9DSfIdPf_pRjSq646_kPr-2-o9NAl16JGghdM"
DISCOVERY = "/.well-known/openid-configuration"


class Clock:
    """Time that passes when a test wishes."""

    def __init__(self) -> None:
        self.passed_seconds = 0.0

    def __call__(self) -> Moment:
        now = clock.now()
        return Moment(now.wall_seconds + self.passed_seconds, now.mono_seconds + self.passed_seconds)


class Known:
    """A provider, what is known of it, and the time."""

    def __init__(self, idp: Idp, *, secret: str | None = CLIENT_SECRET, seconds_max: float = 10.0) -> None:
        self.idp = idp
        self.clock = Clock()
        login = OAuthLogin(kind="oidc", issuer=idp.issuer, client_id=CLIENT_ID)
        self.provider = IdentityProvider(login, secret, REDIRECT, now=self.clock, seconds_max=seconds_max)

    async def claims(self, issuer: str | None = "", *, nonce: str = "n1") -> Mapping[str, Any]:
        """The claims of a login."""
        self.idp.codes["c"] = {
            "client_id": CLIENT_ID, "nonce": "n1", "code_challenge": CHALLENGE, "redirect_uri": REDIRECT,
        }  # fmt: skip
        issuer = self.idp.issuer if issuer == "" else issuer
        return await self.provider.claims("c", issuer, verifier=VERIFIER, nonce=nonce)


@contextlib.asynccontextmanager
async def known(**options: Any) -> AsyncIterator[Known]:
    async with running_idp() as idp:
        yield Known(idp, **options)


async def test_login_is_verified_with_one_request_for_metadata_and_keys() -> None:
    async with known() as one:
        for _ in range(3):
            assert (await one.claims())["sub"] == "s-1"
        assert one.idp.requests == {DISCOVERY: 1, "/jwks": 1, "/token": 3}


async def test_certificate_of_the_provider_is_verified_with_its_ca_file(tmp_path: Path) -> None:
    certificates, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates.issue_cert("127.0.0.1").configure_cert(tls)
    certificates.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with running_idp(tls=tls) as idp:
        for ca_file, is_trusted in ((str(tmp_path / "ca.pem"), True), ("", False)):
            login = OAuthLogin(issuer=idp.issuer, client_id=CLIENT_ID, ca_file=ca_file)
            one = IdentityProvider(login, CLIENT_SECRET, REDIRECT, now=Clock())
            with contextlib.nullcontext() if is_trusted else pytest.raises(ProviderUnavailable, match="Certificate"):
                assert (await one.metadata()).token_endpoint == f"{idp.issuer}/token"


async def test_client_authenticates_in_the_form_if_the_provider_does_not_take_basic() -> None:
    async with known() as one:
        one.idp.metadata["token_endpoint_auth_methods_supported"] = ["client_secret_post"]
        assert (await one.claims())["sub"] == "s-1"


async def test_public_client_sends_its_id_and_no_credential() -> None:
    seen: list[Mapping[str, str]] = []
    async with known(secret=None) as one:
        one.idp.respond = lambda form: seen.append(form) or web.json_response({"id_token": "x"})  # type: ignore[func-returns-value]
        with pytest.raises(LoginFault):
            await one.claims()
    assert seen[0]["client_id"] == CLIENT_ID
    assert "client_secret" not in seen[0]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"issuer": "https://evil.example"}, "another issuer"),
        ({"issuer": None}, "another issuer"),
        ({"token_endpoint": None}, "no token_endpoint"),
        ({"jwks_uri": "file:///etc/passwd"}, "not an https URL"),
        ({"authorization_endpoint": "javascript:alert(1)"}, "not an https URL"),
        ({"authorization_endpoint": "https://x@idp.example/auth"}, "not an https URL"),
        ({"code_challenge_methods_supported": ["plain"]}, "PKCE"),
        ({"id_token_signing_alg_values_supported": ["HS256", "none"]}, "none of"),
        ({"jwks_uri": "http://127.0.0.1:1/"}, "ClientConnector"),
    ],
)  # fmt: skip
async def test_provider_with_unusable_metadata_is_not_used(metadata: dict[str, Any], reason: str) -> None:
    async with known() as one:
        one.idp.metadata = metadata
        with pytest.raises(ProviderUnavailable, match=reason):
            await one.provider.metadata()


@pytest.mark.parametrize("issuer", [None, "https://evil.example", "{issuer}/"])
async def test_code_from_another_provider_is_never_sent_to_this_one(issuer: str | None) -> None:
    async with known() as one:
        with pytest.raises(LoginFault, match="iss"):
            await one.claims(issuer and issuer.format(issuer=one.idp.issuer))
        assert one.idp.requests["/token"] == 0


async def test_missing_issuer_is_allowed_only_if_the_provider_does_not_send_it() -> None:
    async with known() as one:
        one.idp.metadata["authorization_response_iss_parameter_supported"] = None
        assert (await one.claims(None))["sub"] == "s-1"
        with pytest.raises(LoginFault, match="iss"):
            await one.claims("https://evil.example")


async def test_unknown_key_leads_to_one_request_for_the_keys_in_30_seconds() -> None:
    async with known() as one:
        await one.claims()
        one.idp.rotate("k2")
        assert (await one.claims())["sub"] == "s-1"
        assert one.idp.requests["/jwks"] == 2
        one.idp.headers["kid"] = "forged"
        for passed, requests in ((0, 2), (29.0, 2), (31.0, 3), (31.0, 3)):
            one.clock.passed_seconds = passed
            with pytest.raises(LoginFault, match="no key"):
                await one.claims()
            assert one.idp.requests["/jwks"] == requests


async def test_concurrent_logins_with_a_new_key_share_the_request_for_it() -> None:
    async with known() as one:
        await one.claims()
        one.idp.rotate("k2")
        asked = {"client_id": CLIENT_ID, "nonce": "n1", "code_challenge": CHALLENGE, "redirect_uri": REDIRECT}
        one.idp.codes.update({f"c{number}": asked for number in range(20)})
        logins = (
            one.provider.claims(f"c{number}", one.idp.issuer, verifier=VERIFIER, nonce="n1") for number in range(20)
        )
        assert {claims["sub"] for claims in await asyncio.gather(*logins)} == {"s-1"}
        assert one.idp.requests["/jwks"] == 2


async def test_key_that_the_provider_has_withdrawn_is_not_used_after_the_next_refresh() -> None:
    async with known() as one:
        await one.claims()
        withdrawn = one.idp.key
        one.idp.rotate("k2")
        one.idp.sign = lambda _header, claims, _key: jwt.encode(claims, withdrawn, "ES256", headers={"kid": "k1"})
        assert (await one.claims())["sub"] == "s-1"
        await one.provider.refresh()
        with pytest.raises(LoginFault, match="no key"):
            await one.claims()


async def test_metadata_and_keys_are_read_at_the_start_and_again_without_any_login(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provider, "_REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(provider, "_RETRY_SECONDS", 0.01)
    async with known() as one:
        one.idp.status = 503
        running = asyncio.create_task(one.provider.run())
        await until(lambda: one.idp.requests[DISCOVERY] >= 2, "a failed discovery is repeated")
        one.idp.status = None
        await until(lambda: one.idp.requests["/jwks"] >= 2, "keys are read again")
        running.cancel()
        await asyncio.wait([running])
        assert "is_known=True" in repr(one.provider)


async def test_outage_at_the_start_ends_with_the_first_response_of_the_provider() -> None:
    async with known() as one:
        one.idp.status = 503
        for _ in range(3):
            with pytest.raises(ProviderUnavailable):
                await one.provider.metadata()
        assert one.idp.requests[DISCOVERY] == 1  # logins that follow at once wait for nothing
        one.idp.status = None
        one.clock.passed_seconds = 1.0
        assert (await one.claims())["sub"] == "s-1"


async def test_outage_later_keeps_metadata_and_keys() -> None:
    async with known() as one:
        await one.claims()
        one.idp.metadata["issuer"] = "https://evil.example"
        with pytest.raises(ProviderUnavailable):
            await one.provider.refresh()
        assert (await one.claims())["sub"] == "s-1"


@pytest.mark.parametrize("status", [500, 503, 429, 302, 204])
async def test_token_endpoint_without_a_decision_is_an_outage(status: int) -> None:
    async with known() as one:
        one.idp.respond = lambda _form: web.Response(status=status, headers={"Location": f"{one.idp.issuer}/jwks"})
        with pytest.raises(ProviderUnavailable, match=str(status)):
            await one.claims()


async def test_slow_provider_is_an_outage_after_the_time_that_a_login_waits() -> None:
    async with known(seconds_max=0.2) as one:
        await one.provider.metadata()
        one.idp.delay_seconds = 0.15  # each request is in time; the login is not
        one.idp.rotate("k2")
        with pytest.raises(ProviderUnavailable, match=r"0\.2 s"):
            await one.claims()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no id_token"),
        (b"[]", "no id_token"),
        (b'{"id_token":1}', "no id_token"),
        (b'{"access_token":"a"}', "no id_token"),
        (b'{"id_token":"x.y.z"}', "invalid"),
        (b'{"id_token":"\xc3\xa9"}', "ASCII"),
    ],
)
async def test_response_without_a_usable_id_token_is_refused(body: bytes, reason: str) -> None:
    async with known() as one:
        one.idp.respond = lambda _form: web.Response(body=body, content_type="application/json")
        with pytest.raises(LoginFault, match=reason):
            await one.claims()


async def test_response_beyond_its_bound_is_not_read() -> None:
    async with known() as one:
        one.idp.respond = lambda _form: web.Response(body=b" " * 300_000)
        with pytest.raises(ProviderUnavailable, match="bytes"):
            await one.claims()


async def test_error_of_the_provider_is_logged_without_its_description() -> None:
    async with known() as one:
        body = {"error": "invalid_grant", "error_description": "code SECRET"}
        one.idp.respond = lambda _form: web.json_response(body, status=400)
        with pytest.raises(LoginFault, match="invalid_grant") as caught:
            await one.claims()
        assert "SECRET" not in str(caught.value)
