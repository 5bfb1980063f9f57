"""The middleware, for WSGI and ASGI, views and coroutines: what application code sees, and what is refused."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.test import RequestFactory, override_settings

from keyproxy_client.django.middleware import KeyproxyMiddleware
from project.requests import CHALLENGE, HEADERS, IDENTITY, by_asgi, by_wsgi, wsgi_client
from project.testing import keyproxy_settings

Get = Callable[..., Any]
ACTING = {"user": "u_7", "tenant": "acme", "is_test": False}
HIDDEN: dict[str, Any] = {"identity": None, "meta": [], "headers": []}


@pytest.fixture(params=[by_wsgi, by_asgi], ids=["wsgi", "asgi"])
def get(request: pytest.FixtureRequest) -> Get:
    found: Get = request.param
    return found


@pytest.fixture(params=["/seen", "/seen-async"], ids=["view", "coroutine"])
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def seen(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.content
    found: dict[str, Any] = response.json()
    found.pop("peer")
    return found


def assert_problem(response: Any, status: int, code: str, **headers: str) -> dict[str, Any]:
    assert (response.status_code, response["Content-Type"]) == (status, "application/problem+json")
    assert response["Cache-Control"] == "no-store"
    found: dict[str, Any] = response.json()
    assert (found["status"], found["code"]) == (status, code)
    assert {name: response.get(name.replace("_", "-")) for name in headers} == headers
    return found


def test_an_identity_of_a_trusted_peer_is_the_requests_and_acts(get: Get, path: str) -> None:
    found = seen(get(path, HEADERS))
    assert (found["identity"], found["acting"]) == (IDENTITY, ACTING)
    more = {"X-Keyproxy-Actor": "u_worker", "X-Keyproxy-Agent": "crawler", "X-Keyproxy-Test": "true"}
    found = seen(get(path, HEADERS | more))
    assert found["identity"] == IDENTITY | {"actor": "u_worker", "agent": "crawler", "is_test": True}
    assert found["acting"] == ACTING | {"is_test": True}


def test_a_request_without_headers_is_anonymous_and_served(get: Get, path: str) -> None:
    assert seen(get(path)) | {"scope": None} == {**HIDDEN, "acting": None, "scope": None}


UNTRUSTED = [("loopback", "192.0.2.1", 40000), ("loopback", "127.0.0.1", 0), ("loopback", "", 40000),
             ("unix", "127.0.0.1", 40000), ("unix", "192.0.2.1", 40000)]  # fmt: skip
SPELLINGS: list[dict[str, str]] = [
    {}, {"X-Keyproxy-Act-For": "u_1"}, {"x_keyproxy_user": "u_1"}, {"X-Keyproxy_Role": "admin"}, {"X-KEYPROXY-New": "1"},
]  # fmt: skip


@pytest.mark.parametrize(("rule", "peer", "port"), UNTRUSTED)
def test_no_header_of_an_untrusted_peer_reaches_the_application(
    get: Get, path: str, rule: str, peer: str, port: int
) -> None:
    with keyproxy_settings(TRUST=rule):
        for extra in SPELLINGS:
            found = seen(get(path, HEADERS | extra, peer=peer, port=port))
            assert found | {"scope": found["scope"] or []} == {**HIDDEN, "acting": None, "scope": []}


def test_removed_headers_are_also_removed_from_what_an_earlier_middleware_read() -> None:
    class Reading:
        """`request.headers` is computed once."""

        def __init__(self, get_response: Any) -> None:
            self.inner = KeyproxyMiddleware(get_response)

        def __call__(self, request: HttpRequest) -> Any:
            assert "X-Keyproxy-User" in request.headers
            return self.inner(request)

    request = RequestFactory(REMOTE_ADDR="192.0.2.1").get("/", headers=HEADERS)
    served = Reading(lambda one: one)(request)
    assert served is request
    assert "X-Keyproxy-User" not in request.headers
    assert request.keyproxy is None


def test_removal_is_logged_once_a_minute_without_values(get: Get, caplog: pytest.LogCaptureFixture) -> None:
    with keyproxy_settings(TENANT=f"t{secrets.token_hex(4)}"), caplog.at_level(logging.WARNING, "keyproxy_client"):
        for _ in range(3):
            seen(get("/seen", HEADERS | {"X-Keyproxy-User": "u_secret"}, peer="192.0.2.1"))
    assert len(caplog.records) == 1
    assert "u_secret" not in caplog.text
    with keyproxy_settings(), caplog.at_level(logging.WARNING, "keyproxy_client"):
        seen(get("/seen", peer="192.0.2.1"))
    assert len(caplog.records) == 1, "nothing was removed"


def test_a_unix_socket_is_trusted_by_that_rule_alone() -> None:
    socket: tuple[str, None] = ("/run/app.sock", None)
    for rule, identity in (("unix", IDENTITY), ("loopback", None)):
        with keyproxy_settings(TRUST=rule):
            assert seen(by_wsgi("/seen", HEADERS, peer="", port=None))["identity"] == identity
            assert seen(by_asgi("/seen-async", HEADERS, peer="", port=0, server=socket))["identity"] == identity


MALFORMED: list[dict[str, str]] = [
    {"X-Keyproxy-User": "u_1,u_2"}, {"X-Keyproxy-User": ""}, {"X-Keyproxy-User": "u 1"}, {"X-Keyproxy-Test": "yes"},
    {"X-Keyproxy-Scope": "a,b"}, {"X-Keyproxy-Tenant": "é"}, {"X-Keyproxy-Actor": "u_1,u_2"},
    {"X-Keyproxy-Key-Id": "x" * 129},
]  # fmt: skip


@pytest.mark.parametrize("wrong", MALFORMED, ids=str)
def test_malformed_headers_of_a_trusted_peer_are_refused(get: Get, path: str, wrong: dict[str, str]) -> None:
    assert_problem(get(path, HEADERS | wrong), 400, "identity_invalid")


@pytest.mark.parametrize("absent", HEADERS)
def test_an_incomplete_set_of_headers_is_refused(get: Get, absent: str) -> None:
    assert_problem(get("/seen", {k: v for k, v in HEADERS.items() if k != absent}), 400, "identity_invalid")


def test_a_repeated_header_of_a_trusted_peer_is_refused() -> None:
    for name in ("X-Keyproxy-User", "x_keyproxy_user", "x-keyproxy.user"):
        assert_problem(by_asgi("/seen-async", [*HEADERS.items(), (name, "u_7")]), 400, "identity_invalid")


def test_another_prefix_is_read_and_removed(get: Get) -> None:
    acme = {name.replace("X-Keyproxy-", "X-Acme-"): value for name, value in HEADERS.items()}
    with keyproxy_settings(HEADER_PREFIX="X-Acme-"):
        assert seen(get("/seen", acme))["identity"] == IDENTITY
        assert seen(get("/seen", HEADERS))["identity"] is None
    assert seen(get("/seen", acme))["identity"] is None
    with keyproxy_settings(HEADER_PREFIX="X-Acme-", TRUST="unix"):
        response = get("/seen", acme)
        assert seen(response)["identity"] is None


# Signed.

NO_JWKS = "http://127.0.0.1:1/jwks.json"


def test_an_invalid_assertion_is_no_identity_and_its_headers_are_removed(get: Get, path: str) -> None:
    with keyproxy_settings(TRUST="signed", JWKS_URL=NO_JWKS):
        found = seen(get(path, HEADERS | {"X-Keyproxy-Assertion": "a.b.c"}))
        assert found | {"scope": found["scope"] or []} == {**HIDDEN, "acting": None, "scope": []}
        assert_problem(get("/guarded", {"X-Keyproxy-Assertion": "a.b.c"}), 401, "identity_untrusted")
        found = seen(get(path, HEADERS))
        assert found["identity"] is None, "plain headers prove nothing"
        assert_problem(get("/guarded", HEADERS), 401, "identity_missing")


def test_an_assertion_that_cannot_be_verified_now_is_refused_with_503(get: Get, path: str) -> None:
    import jwt
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    headers = {"typ": "keyproxy-assertion+jwt", "kid": "k"}
    assertion = jwt.encode({"iss": "keyproxy"}, key, algorithm="ES256", headers=headers)
    with keyproxy_settings(TRUST="signed", JWKS_URL=NO_JWKS):
        response = get(path, {"X-Keyproxy-Assertion": assertion})
    assert_problem(response, 503, "identity_unverifiable", Retry_After="5")


# Acting.


def login(client: Any, user: Any) -> Any:
    client.force_login(user)
    return client


@pytest.mark.usefixtures("db")
def test_the_user_of_a_session_acts_if_there_is_no_identity() -> None:
    user = get_user_model().objects.create_user("ada")
    client = login(wsgi_client(), user)
    for path in ("/seen", "/seen-async"):
        assert client.get(path).json()["acting"] == {"user": f"u_{user.pk}", "tenant": "acme", "is_test": False}
        assert client.get(path, headers=HEADERS).json()["acting"] == ACTING
    assert wsgi_client().get("/seen").json()["acting"] is None


@pytest.mark.usefixtures("db")
def test_a_user_of_a_session_that_has_no_id_acts_for_none_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    client = login(wsgi_client(), get_user_model().objects.create_user("no id"))
    with keyproxy_settings(USER_ID="{username}"):
        assert client.get("/seen").json()["acting"] is None
    assert "no valid id" in caplog.text
    assert "no id\n" not in caplog.text


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators")
@pytest.mark.parametrize(
    ("application", "path"),
    # Django does not stream coroutines over WSGI.
    [(by_wsgi, "/streamed"), (by_asgi, "/streamed"), (by_asgi, "/streamed-async")],
)
def test_the_acting_user_of_a_request_acts_while_its_content_is_streamed(application: Get, path: str) -> None:
    response = application(path, HEADERS)
    found = b"".join(response.streaming_content) if response.streaming else response.content
    assert set(found.split()) == {b"u_7"}


# The development identity.

FIXED = {"user": "u_dev", "scopes": ["jobs:write"]}
DEVELOPMENT = {
    "user": "u_dev",
    "tenant": "acme",
    "scopes": ["jobs:write"],
    "is_test": False,
    "key_id": "key_development",
}


@pytest.mark.parametrize("rule", ["unix", "loopback", "signed"])
def test_the_development_identity_is_for_requests_from_this_machine_without_another(get: Get, rule: str) -> None:
    with keyproxy_settings(TRUST=rule, JWKS_URL=NO_JWKS, DEV_IDENTITY=FIXED), override_settings(DEBUG=True):
        expected = {**DEVELOPMENT, "actor": None, "agent": None}
        assert seen(get("/seen"))["identity"] == expected
        assert get("/guarded").status_code == 200
        assert seen(get("/seen", peer="192.0.2.1"))["identity"] is None
        assert seen(get("/seen", peer="127.0.0.1", port=0))["identity"] is None
        if rule == "loopback":
            assert seen(get("/seen", HEADERS))["identity"] == IDENTITY
            assert_problem(get("/seen", {"X-Keyproxy-User": "u_1"}), 400, "identity_invalid")
        if rule == "signed":
            assert_problem(get("/guarded", {"X-Keyproxy-Assertion": "a.b.c"}), 401, "identity_untrusted")
    with keyproxy_settings(DEV_IDENTITY=FIXED), override_settings(DEBUG=False):
        assert seen(get("/seen"))["identity"] is None


# Guards and construction.


@pytest.mark.parametrize("path", ["/guarded", "/guarded-async"])
def test_a_guard_refuses_with_problems(get: Get, path: str) -> None:
    assert get(path, HEADERS).status_code == 200
    assert_problem(get(path), 401, "identity_missing", WWW_Authenticate=CHALLENGE)
    assert_problem(get(path, HEADERS, peer="192.0.2.1"), 401, "identity_missing", WWW_Authenticate=CHALLENGE)
    found = assert_problem(get(path, HEADERS | {"X-Keyproxy-Scope": "jobs:read"}), 403, "insufficient_scope")
    assert "jobs:write" in found["detail"]
    with override_settings(MIDDLEWARE=settings.MIDDLEWARE[1:]):
        assert get(path, HEADERS).status_code == 200, "a guard judges the request itself"
        assert get(path, HEADERS, peer="192.0.2.1").status_code == 401


def test_the_middleware_is_not_constructed_without_a_trust_rule() -> None:
    with keyproxy_settings(TRUST=None), pytest.raises(ImproperlyConfigured, match="TRUST"):
        KeyproxyMiddleware(lambda request: request)  # type: ignore[arg-type, return-value]
    with keyproxy_settings(TRUST_NETWORKS=["0.0.0.0/0"]), pytest.raises(ImproperlyConfigured, match="too large"):
        KeyproxyMiddleware(lambda request: request)  # type: ignore[arg-type, return-value]
