"""The classes for Django REST framework: what they grant, and their refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.cache import cache
from django.test import override_settings
from rest_framework.authentication import BasicAuthentication, SessionAuthentication
from rest_framework.exceptions import AuthenticationFailed, NotAuthenticated, PermissionDenied
from rest_framework.permissions import IsAdminUser, IsAuthenticated
from rest_framework.test import APIRequestFactory, force_authenticate
from rest_framework.views import APIView
from rest_framework_api_key.models import APIKey

from keyproxy_client.django.drf import HasAPIKey, HasScope, KeyproxyAuthentication
from project import views
from project.requests import CHALLENGE, HEADERS, by_wsgi, headers_of, wsgi_client
from project.testing import keyproxy_settings

pytestmark = pytest.mark.usefixtures("db")

FALLBACK = "rest_framework_api_key.permissions.HasAPIKey"


@pytest.fixture(params=[True, False], ids=["middleware", "no-middleware"], autouse=True)
def middleware(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Every class works without the middleware too."""
    cache.clear()
    paths = settings.MIDDLEWARE if request.param else settings.MIDDLEWARE[1:]
    with override_settings(MIDDLEWARE=paths):
        yield request.param


@pytest.fixture
def ada(db: None) -> Any:
    return get_user_model().objects.create_user("ada")


def assert_problem(response: Any, status: int, code: str, **headers: str) -> dict[str, Any]:
    found: dict[str, Any] = response.json()
    assert (response.status_code, response["Content-Type"]) == (status, "application/problem+json"), found
    assert response["Cache-Control"] == "no-store"
    assert (found["status"], found["code"]) == (status, code)
    assert {name: response.get(name.replace("_", "-")) for name in headers} == headers
    return found


def test_authentication_returns_the_user_and_the_identity(ada: Any) -> None:
    found = by_wsgi("/authenticated", headers_of(ada)).json()
    assert found["user"] == "ada"
    assert found["auth"] == found["identity"]
    assert found["auth"]["user"] == f"u_{ada.pk}"


@pytest.mark.parametrize("path", ["/authenticated", "/shown"])
def test_an_unknown_or_inactive_user_is_refused_with_401(ada: Any, path: str) -> None:
    unknown = by_wsgi(path, {**HEADERS, "X-Keyproxy-User": "u_999999"})
    assert_problem(unknown, 401, "authentication_failed", WWW_Authenticate=CHALLENGE)
    other_tenant = by_wsgi(path, headers_of(ada, **{"X-Keyproxy-Tenant": "globex"}))
    ada.is_active = False
    ada.save()
    inactive = by_wsgi(path, headers_of(ada))
    assert unknown.content == inactive.content == other_tenant.content


@pytest.mark.parametrize("path", ["/authenticated", "/shown", "/keyed", "/keyed-without-user", "/scoped", "/throttled"])
def test_headers_of_an_untrusted_peer_are_no_identity_anywhere(ada: Any, path: str) -> None:
    response = by_wsgi(path, headers_of(ada), peer="192.0.2.1")
    if path in ("/shown", "/throttled"):
        found = response.json()
        assert (found["user"], found["auth"], found["identity"], found["meta"]) == (None, None, None, [])
    else:
        assert response.status_code == 401
        assert response["WWW-Authenticate"] == CHALLENGE


@pytest.mark.parametrize("path", ["/shown", "/keyed", "/keyed-without-user", "/scoped", "/throttled", "/keyed-or-user"])
def test_drf_refuses_without_the_middleware_what_the_middleware_would_refuse(ada: Any, path: str) -> None:
    malformed = headers_of(ada, **{"X-Keyproxy-Test": "maybe"})
    assert_problem(by_wsgi(path, malformed), 400, "identity_invalid")


@pytest.mark.parametrize("path", ["/keyed", "/keyed-without-user"])
def test_has_api_key_is_true_exactly_if_an_identity_is_present(ada: Any, path: str) -> None:
    assert by_wsgi(path, headers_of(ada)).status_code == 200
    assert_problem(by_wsgi(path), 401, "identity_missing", WWW_Authenticate=CHALLENGE)
    assert by_wsgi("/keyed-without-user", HEADERS).status_code == 200, "the user does not matter"


def test_has_scope_names_the_scope_that_is_missing(ada: Any) -> None:
    assert by_wsgi("/scoped", HEADERS).status_code == 200
    found = assert_problem(by_wsgi("/scoped", HEADERS | {"X-Keyproxy-Scope": "jobs:read"}), 403, "insufficient_scope")
    assert "'jobs:write'" in found["detail"]
    assert_problem(by_wsgi("/scoped"), 401, "identity_missing", WWW_Authenticate=CHALLENGE)


@pytest.mark.parametrize("scopes", [(), ("jobs write",), ("",), (1,)])
def test_has_scope_refuses_an_invalid_scope(scopes: Any) -> None:
    with pytest.raises(ValueError, match="scope"):
        HasScope(*scopes)


def test_permissions_combine(ada: Any) -> None:
    client = wsgi_client()
    client.force_login(ada)
    assert by_wsgi("/keyed-or-user", headers_of(ada)).status_code == 200
    refused = by_wsgi("/keyed-or-user")
    assert (refused.status_code, refused["WWW-Authenticate"]) == (401, CHALLENGE)
    assert by_wsgi("/scoped-and-refused", HEADERS).status_code == 403
    assert by_wsgi("/scoped-and-refused").status_code == 403
    assert by_wsgi("/unkeyed").status_code == 200
    assert by_wsgi("/unkeyed", HEADERS).status_code == 403


def test_an_operand_that_refuses_leaves_no_trace_in_a_response_that_another_one_grants(ada: Any) -> None:
    request = APIRequestFactory(REMOTE_ADDR="127.0.0.1").get("/keyed-or-user")
    force_authenticate(request, ada)
    request.keyproxy = None
    response = views.KeyedOrUser.as_view()(request)
    assert (response.status_code, response.render()["Content-Type"]) == (200, "application/json")


@pytest.mark.parametrize("accept", ["text/html", "application/json", "*/*", "application/problem+json"])
def test_a_refusal_has_its_form_for_every_accept_header(accept: str) -> None:
    response = by_wsgi("/keyed", {"Accept": accept})
    if accept == "application/problem+json":
        assert response.status_code == 406, "DRF negotiates before it authenticates"
    else:
        assert_problem(response, 401, "identity_missing")


def test_a_projects_exception_handler_still_decides_on_the_form() -> None:
    with override_settings(REST_FRAMEWORK={"EXCEPTION_HANDLER": "project.exceptions.wrapped"}):
        response = by_wsgi("/keyed")
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "identity_missing"


# The fallback.


def test_the_old_permission_decides_on_requests_without_identity(ada: Any) -> None:
    _, key = APIKey.objects.create_key(name="old")
    old = {"Authorization": f"Api-Key {key}"}
    for path in ("/keyed", "/keyed-without-user"):
        assert_problem(by_wsgi(path, old), 401, "identity_missing")
        with keyproxy_settings(HAS_API_KEY_FALLBACK=FALLBACK):
            assert by_wsgi(path, old).status_code == 200
            assert_problem(by_wsgi(path, {"Authorization": "Api-Key x.y"}), 401, "identity_missing")
            assert_problem(by_wsgi(path), 401, "identity_missing")
            assert by_wsgi(path, headers_of(ada)).status_code == 200
        with keyproxy_settings(HAS_API_KEY_FALLBACK=FALLBACK, TRUST="signed", JWKS_URL="http://127.0.0.1:1/"):
            forged = old | {"X-Keyproxy-Assertion": "a.b.c"}
            assert_problem(by_wsgi(path, forged), 401, "identity_untrusted")


def test_the_fallback_also_decides_on_objects() -> None:
    class No(IsAuthenticated):
        def has_permission(self, request: Any, view: Any) -> bool:
            return True

        def has_object_permission(self, request: Any, view: Any, obj: Any) -> bool:
            return False

    with keyproxy_settings(HAS_API_KEY_FALLBACK=No):
        for headers, expected in (({}, False), (HEADERS, True)):
            permission = HasAPIKey()
            request = APIRequestFactory(REMOTE_ADDR="127.0.0.1").get("/", headers=headers)
            assert permission.has_permission(request, None)
            assert permission.has_object_permission(request, None, object()) is expected


@pytest.mark.parametrize("first", [KeyproxyAuthentication, SessionAuthentication, BasicAuthentication])
@pytest.mark.parametrize(
    ("headers", "kind", "status"),
    [({}, NotAuthenticated, 401), (HEADERS, AuthenticationFailed, 401), (None, PermissionDenied, 403)],
    ids=["no-identity", "unknown-user", "no-scope"],
)
def test_a_refusal_is_the_exception_of_drf_and_keeps_its_status_and_challenge(
    ada: Any, first: Any, headers: Any, kind: type[Exception], status: int
) -> None:
    caught: list[Exception] = []

    class View(APIView):
        authentication_classes = (first, KeyproxyAuthentication)
        permission_classes: Any = (HasScope("jobs:purge"),)

        def handle_exception(self, exc: Exception) -> Any:
            caught.append(exc)
            return super().handle_exception(exc)

    stated = headers_of(ada) if headers is None else headers
    response = View.as_view()(APIRequestFactory(REMOTE_ADDR="127.0.0.1").get("/", headers=stated))
    assert isinstance(caught[0], kind)
    assert response.status_code == status
    assert response["WWW-Authenticate"].startswith(CHALLENGE)


# Throttling.


def test_a_request_with_identity_is_never_throttled() -> None:
    assert [by_wsgi("/throttled", HEADERS).status_code for _ in range(3)] == [200, 200, 200]
    assert [by_wsgi("/throttled").status_code for _ in range(2)] == [200, 429]
    assert by_wsgi("/throttled", HEADERS).status_code == 200
    assert by_wsgi("/throttled", HEADERS, peer="192.0.2.9").status_code == 200, "the first of another address"
    assert by_wsgi("/throttled", HEADERS, peer="192.0.2.9").status_code == 429


def test_classes_are_described_for_tools_that_read_views() -> None:
    assert repr(HasScope("a", "b")) == "HasScope('a', 'b')"
    assert KeyproxyAuthentication().authenticate_header(None) == CHALLENGE
    assert (IsAdminUser | HasScope("a"))().op2.has_permission is not None
