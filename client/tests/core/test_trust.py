"""Which peers a rule trusts, and that no rule trusts all."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from keyproxy_client.asgi import IdentityMiddleware as AsgiMiddleware
from keyproxy_client.identity import Trust
from keyproxy_client.wsgi import IdentityMiddleware as WsgiMiddleware

TCP = ("127.0.0.1", 8000)


def scope(client: Any, server: Any = TCP) -> dict[str, Any]:
    return {"type": "http", "client": client, "server": server, "headers": []}


@pytest.mark.parametrize(
    ("server", "is_trusted"),
    [
        (("/run/app.sock", None), True), (["/run/app.sock", None], True), (TCP, False), (("/run/app.sock", 80), False),
        (("run/app.sock", None), False), (("\0abstract", None), False), (("", None), False), ((None, None), False),
        (("/run/app.sock",), False), ("/run/app.sock", False), (None, False), ((b"/run/app.sock", None), False),
        (("/run/app.sock", 0), False),
    ],
)  # fmt: skip
def test_unix_trusts_an_asgi_server_on_an_absolute_path_only(server: Any, is_trusted: bool) -> None:
    assert Trust.unix().peer_is_trusted_asgi(scope(None, server), None) is is_trusted


def test_unix_does_not_trust_a_scope_without_server() -> None:
    assert not Trust.unix().peer_is_trusted_asgi({"type": "http", "headers": []}, None)


@pytest.mark.parametrize(
    ("environ", "is_trusted"),
    [
        ({}, True), ({"REMOTE_ADDR": ""}, True), ({"REMOTE_ADDR": "127.0.0.1"}, False), ({"REMOTE_ADDR": "unix"}, False),
        # waitress with `X-Forwarded-For: :80` or `:`, and gunicorn with a PROXY header that states no address.
        ({"REMOTE_ADDR": "", "REMOTE_PORT": "80"}, False), ({"REMOTE_ADDR": "", "REMOTE_PORT": ""}, False),
        ({"REMOTE_ADDR": None, "REMOTE_PORT": "None", "PROXY_PROTOCOL": "UNKNOWN"}, False),
        ({"REMOTE_ADDR": "", "PROXY_PROTOCOL": "TCP4"}, False),
    ],
)  # fmt: skip
def test_unix_trusts_a_wsgi_peer_without_address_only(environ: dict[str, str], is_trusted: bool) -> None:
    assert Trust.unix().peer_is_trusted_wsgi(environ, None) is is_trusted


TRUSTED_CLIENTS: list[Any] = [
    ("127.0.0.1", 40_000), ["127.9.9.9", 1], ("::1", 40_000), ("127.0.0.1", 65_535), ("::ffff:127.0.0.1", 40_000),
    ("127.0.0.1", "40000"),
]  # fmt: skip
UNTRUSTED_CLIENTS: list[Any] = [
    None, ("127.0.0.1", 0), ("::1", 0), ("127.0.0.1", "0"), ("127.0.0.1", None), ("127.0.0.1", "x"), ("127.0.0.1", -1),
    ("127.0.0.1", 65_536), ("127.0.0.1",), ("128.0.0.1", 40_000), ("::ffff:10.0.0.1", 40_000), ("10.0.0.1", 40_000),
    ("::2", 40_000), ("localhost", 40_000), ("", 40_000), ("127.1", 40_000), ("0177.0.0.1", 40_000),
    ("127.0.0.1 ", 40_000), ("unix", 1), (None, 40_000), (b"127.0.0.1", 40_000),
]  # fmt: skip


@pytest.mark.parametrize(
    ("client", "is_trusted"), [(one, True) for one in TRUSTED_CLIENTS] + [(one, False) for one in UNTRUSTED_CLIENTS]
)
def test_loopback_trusts_an_asgi_peer_in_the_networks_with_a_port(client: Any, is_trusted: bool) -> None:
    assert Trust.loopback().peer_is_trusted_asgi(scope(client), None) is is_trusted


@pytest.mark.parametrize(
    ("environ", "is_trusted"),
    [
        ({"REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "40000"}, True), ({"REMOTE_ADDR": "::1", "REMOTE_PORT": "1"}, True),
        ({"REMOTE_ADDR": "127.0.0.1"}, True), ({"REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "0"}, False),
        ({"REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": ""}, False),
        ({"REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": 0}, False),
        ({"REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": 40000}, True),
        ({"REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "x"}, False),
        ({"REMOTE_ADDR": "10.0.0.1", "REMOTE_PORT": "1"}, False),
        ({"REMOTE_ADDR": "", "REMOTE_PORT": "1"}, False), ({}, False),
        ({"REMOTE_ADDR": "127.0.0.1", "werkzeug.proxy_fix.orig": {"REMOTE_ADDR": "10.0.0.1"}}, False),
        ({"REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "5555", "PROXY_PROTOCOL": "TCP4"}, False),
    ],
)  # fmt: skip
def test_loopback_trusts_a_wsgi_peer_in_the_networks(environ: dict[str, Any], is_trusted: bool) -> None:
    assert Trust.loopback().peer_is_trusted_wsgi(environ, None) is is_trusted


@pytest.mark.parametrize(
    ("forwarding", "is_trusted"),
    [
        # uvicorn takes the port from the address, daphne from X-Forwarded-Port; both by `int`.
        ([b"127.0.0.1:40000"], False), ([b"203.0.113.9, 127.0.0.1:40000"], False),
        ([b"127.0.0.1:40000,203.0.113.9"], False),
        ([b"203.0.113.9", b"127.0.0.1: 40000"], False), ([b"127.0.0.1:4_0000"], False), ([b"127.0.0.1:+40000"], False),
        ([b"127.0.0.1:040000"], False), ([b"127.0.0.1", b"40000"], False), ([b"127.0.0.1", b" 40000 "], False),
        (["127.0.0.1:40000"], False), (["127.0.0.1", "40000"], False),
        ([b"127.0.0.1"], True), ([b"127.0.0.1, 127.0.0.1"], True), ([b"127.0.0.1:40001"], True), ([b"443"], True),
        ([b"203.0.113.9:40000"], True), ([b"2001:db8::4000"], True), ([b""], True),
        ([b",:,"], True), ([b"9" * 5000], True),
        ([b'for="127.0.0.1:40000"'], False), ([b"for=127.0.0.1:40000;proto=http"], False), ([b"for=127.0.0.1"], True),
    ],
)  # fmt: skip
def test_loopback_does_not_trust_a_peer_that_a_forwarding_header_names(forwarding: list[Any], is_trusted: bool) -> None:
    trust = Trust.loopback()
    assert trust.peer_is_trusted_asgi(scope(("127.0.0.1", 40_000)), forwarding) is is_trusted
    environ = {"REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "40000"}
    assert trust.peer_is_trusted_wsgi(environ, forwarding) is is_trusted


def test_loopback_does_not_trust_an_ipv6_peer_that_a_forwarding_header_names() -> None:
    assert not Trust.loopback().peer_is_trusted_asgi(scope(("::1", 40_000)), [b"[::1]:40000"])


STATES_LOOPBACK = [
    "127.0.0.1", "203.0.113.9, 127.0.0.1", "::1", "[::1]:40000", "::ffff:127.0.0.1", "127.0.0.1:5", "for=127.0.0.1",
    'For="[::1]:5";by=x', " 127.9.9.9 ", "::1%1",
]  # fmt: skip


@pytest.mark.parametrize("stated", STATES_LOOPBACK)
@pytest.mark.parametrize(
    ("server", "is_trusted"),
    [
        # An adapter of ASGI to WSGI, or Granian's, keeps no port of the connection; waitress keeps it.
        ({}, False), ({"SERVER_SOFTWARE": "Granian"}, False),
        ({"REMOTE_PORT": "40001", "waitress.client_disconnected": None}, False),
        # Servers that take no address from headers: the client of keyproxy is on this machine.
        ({"REMOTE_PORT": "40001"}, True), ({"uwsgi.version": b"2.0"}, True),
        ({"SERVER_SOFTWARE": "WSGIServer/0.2"}, True),
    ],
)  # fmt: skip
def test_loopback_does_not_trust_a_wsgi_peer_whose_address_a_header_may_have_stated(
    stated: str, server: dict[str, Any], is_trusted: bool
) -> None:
    environ = {"REMOTE_ADDR": "127.0.0.1", **server}
    assert Trust.loopback().peer_is_trusted_wsgi(environ, [stated]) is is_trusted
    assert Trust.loopback().peer_is_trusted_wsgi(environ, ["203.0.113.9", "for=_hidden", "unknown", ""])


def test_loopback_trusts_the_networks_that_are_named_and_no_other() -> None:
    trust = Trust.loopback(["10.1.0.0/16", "fd00::/8"])
    addresses = {"10.1.2.3": True, "10.2.0.1": False, "127.0.0.1": False, "fd00::7": True, "::1": False}
    found = {address: trust.peer_is_trusted_asgi(scope((address, 40_000)), None) for address in addresses}
    assert found == addresses


@pytest.mark.parametrize(
    "networks",
    [
        ["0.0.0.0/0"], ["::/0"], ["0.0.0.0/1", "128.0.0.0/1"], ["8.0.0.0/7"], ["10.0.0.0/8", "11.0.0.0/8"], ["2000::/3"],
        ["::/1", "8000::/1"], [], ["*"], ["127.0.0.1/8"], ["unix"],
    ],
)  # fmt: skip
def test_networks_that_trust_all_or_are_invalid_are_refused(networks: list[str]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Trust.loopback(networks)


@pytest.mark.parametrize("networks", ["127.0.0.0/8", b"127.0.0.0/8"])
def test_networks_as_one_string_are_refused(networks: Any) -> None:
    with pytest.raises(TypeError, match="list"):
        Trust.loopback(networks)


@pytest.mark.parametrize("middleware", [AsgiMiddleware, WsgiMiddleware])
@pytest.mark.parametrize("arguments", [{}, {"trust": None}, {"trust": "loopback"}, {"trust": True}, {"trust": Trust}])
def test_middleware_without_a_trust_rule_cannot_be_constructed(middleware: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        middleware(lambda *_: None, **arguments)
    with pytest.raises(TypeError):
        middleware(lambda *_: None, Trust.unix())


def test_no_trust_rule_can_be_made_without_a_condition() -> None:
    with pytest.raises(TypeError):
        Trust()
    made = {name for name, method in inspect.getmembers(Trust, inspect.ismethod) if not name.startswith("_")}
    assert made == {"unix", "loopback", "signed"}


def test_signed_without_its_libraries_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"keyproxy-client\[signed\]"):
        Trust.signed("https://keyproxy.example/jwks.json")
