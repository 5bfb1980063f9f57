"""The middleware of WSGI, without a server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest

from keyproxy_client.acting import acting
from keyproxy_client.identity import ENVIRON_KEY, Trust
from keyproxy_client.wsgi import PROBLEM_KEY, IdentityMiddleware
from test_identity_headers import IDENTITY, STATED, environ

UNTRUSTED = {"REMOTE_ADDR": "192.0.2.9", "REMOTE_PORT": "40000"}


class App:
    """Records its environ and the acting user, at the call and in each part of the body."""

    def __init__(self, body: Any = None) -> None:
        self.environ: dict[str, Any] = {}
        self.acting: list[Any] = []
        self.is_closed = False
        self._body = body

    def __call__(self, given: dict[str, Any], start_response: Any) -> Any:
        self.environ = dict(given)
        self.acting.append(acting())
        start_response("200 OK", [("Content-Type", "text/plain")])
        return self._parts() if self._body is None else self._body

    def _parts(self) -> Iterator[bytes]:
        try:
            for part in (b"a", b"b"):
                self.acting.append(acting())
                yield part
        finally:
            self.is_closed = True
            self.acting.append(acting())


def call(application: Any, given: dict[str, Any]) -> tuple[str, dict[str, str], bytes]:
    started: list[Any] = []
    body = application(given, lambda status, headers, exc_info=None: started.append((status, dict(headers))))
    try:
        content = b"".join(body)
    finally:
        if hasattr(body, "close"):
            body.close()
    return *started[0], content


def test_identity_of_a_trusted_request_is_in_the_environ() -> None:
    app = App()
    assert call(IdentityMiddleware(app, trust=Trust.unix()), environ(REMOTE_ADDR=""))[2] == b"ab"
    assert app.environ[ENVIRON_KEY] == IDENTITY
    assert app.environ["HTTP_X_KEYPROXY_USER"] == "u_42"
    assert app.environ[PROBLEM_KEY] is None


def test_acting_user_is_that_of_the_request_in_each_step_of_the_body_and_not_between() -> None:
    app = App()
    call(IdentityMiddleware(app, trust=Trust.unix()), environ())
    assert [one.user for one in app.acting] == ["u_42"] * 4
    assert app.is_closed
    body = IdentityMiddleware(app, trust=Trust.unix())(environ(), lambda *_: None)
    assert acting() is None
    assert next(iter(body)) == b"a"
    assert acting() is None
    getattr(body, "close")()  # noqa: B009 - a body of WSGI may have it


def test_acting_user_ends_with_a_request_that_fails() -> None:
    def app(given: Any, start_response: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(IdentityMiddleware(app, trust=Trust.unix()), environ())
    assert acting() is None


@pytest.mark.parametrize("body", [[b"a"], (b"a",), FileWrapper(io.BytesIO(b"a"))])
def test_body_that_runs_no_code_reaches_the_server_as_it_is(body: Any) -> None:
    middleware = IdentityMiddleware(App(body), trust=Trust.unix())
    given = environ() | {"wsgi.file_wrapper": FileWrapper}
    assert middleware(given, lambda *_: None) is body
    assert acting() is None


@pytest.mark.parametrize(
    "name",
    ["HTTP_X_KEYPROXY_USER", "HTTP_X_KEYPROXY_ASSERTION", "HTTP_X_KEYPROXY_ANYTHING", "HTTP_X.KEYPROXY.USER",
     "HTTP_X-KEYPROXY-USER", "HTTP_x_keyproxy_user"],
)  # fmt: skip
def test_every_header_under_the_prefix_of_an_untrusted_request_is_removed(name: str) -> None:
    app = App()
    call(IdentityMiddleware(app, trust=Trust.unix()), environ({}, HTTP_X_KEY="1", **UNTRUSTED, **{name: "u_1"}))
    assert name not in app.environ
    assert {"HTTP_HOST", "HTTP_X_KEY", "REMOTE_ADDR"} < set(app.environ)
    assert app.environ[ENVIRON_KEY] is None
    assert app.environ[PROBLEM_KEY].code == "identity_missing"
    assert app.acting[0] is None


def test_identity_that_another_component_left_in_the_environ_is_replaced() -> None:
    app = App()
    call(IdentityMiddleware(app, trust=Trust.unix()), environ({}) | {ENVIRON_KEY: IDENTITY})
    assert app.environ[ENVIRON_KEY] is None


@pytest.mark.parametrize("user", ["u_1,u_2", "", "u 1"])
def test_invalid_headers_of_a_trusted_peer_are_refused_with_400(user: str) -> None:
    app = App()
    status, headers, body = call(IdentityMiddleware(app, trust=Trust.unix()), environ({**STATED, "User": user}))
    assert (status, headers["Content-Type"]) == ("400 Bad Request", "application/problem+json")
    assert json.loads(body)["code"] == "identity_invalid"
    assert (headers["Content-Length"], app.environ) == (str(len(body)), {})


def test_peer_with_an_address_in_the_networks_is_trusted_by_loopback_only() -> None:
    app = App()
    given = environ(REMOTE_ADDR="127.0.0.1", REMOTE_PORT="40000")
    call(IdentityMiddleware(app, trust=Trust.loopback()), dict(given))
    assert app.environ[ENVIRON_KEY] == IDENTITY
    call(IdentityMiddleware(app, trust=Trust.unix()), dict(given))
    assert app.environ[ENVIRON_KEY] is None
    call(IdentityMiddleware(app, trust=Trust.loopback()), dict(given) | {"HTTP_X_FORWARDED_FOR": "127.0.0.1:40000"})
    assert app.environ[ENVIRON_KEY] is None


def test_middleware_keeps_the_rules_of_wsgi() -> None:
    given: dict[str, Any] = {"QUERY_STRING": ""}
    setup_testing_defaults(given)
    given |= environ()
    checked = validator(IdentityMiddleware(validator(App()), trust=Trust.unix()))
    assert call(checked, given)[0] == "200 OK"
