"""Real servers behind a real keyproxy: which identity they see, and what a request past it achieves.

One proxy has two upstreams: a unix socket for live keys, and a TCP port for test keys. The servers take turns there.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import websockets.sync.client
from websockets.exceptions import InvalidStatus

from deployment import Deployment, free_port, serving
from guarded_app import asgi_app
from keyproxy_client.identity import Trust

SERVICE_IDENTITY = {"tenant": "acme", "scopes": ["jobs:read", "jobs:write"], "agent": None}
SPOOFED = {
    "X-Keyproxy-User": "u_admin",
    "X-Keyproxy-Tenant": "acme",
    "X-Keyproxy-Scope": "jobs:purge",
    "X-Keyproxy-Test": "false",
    "X-Keyproxy-Key-Id": "key_1",
}


@dataclass(frozen=True)
class Site:
    """The proxy: its origin, its upstreams, and keys that act for users. `direct`: the TCP upstream without the proxy."""

    origin: str
    path: Path
    port: int
    jwks_url: str
    live: dict[str, str]
    test: dict[str, str]

    @property
    def direct(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def socket_client(self) -> httpx.Client:
        """A client of the unix socket without the proxy."""
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self.path)), base_url="http://compute")


@pytest.fixture(scope="module")
def site(deployment: Deployment) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(dir=deployment.home) as home:
        path, port = Path(home) / "app.sock", free_port()
        tables = {"upstream": {"url": f"unix:{path}", "test_url": f"http://127.0.0.1:{port}"}}
        with contextlib.ExitStack() as stack:
            with listening(path, port):
                # A proxy is ready once it has reached its upstream.
                origin, ops = stack.enter_context(serving(deployment.python, deployment.dsn, Path(home), tables))
            live, test = (
                {"Authorization": f"Api-Key {deployment.service_key_file('acme', test=mode).read_text().strip()}"}
                for mode in (False, True)
            )
            yield Site(origin, path, port, f"{ops}/jwks.json", live, test)


@contextlib.contextmanager
def listening(path: Path, port: int) -> Iterator[None]:
    """Something that accepts connections at both addresses."""
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", port)):
        unix.bind(str(path))
        unix.listen()
        yield
    path.unlink()


@contextlib.contextmanager
def uvicorn_server(app: Any, **options: Any) -> Iterator[None]:
    """uvicorn in a thread, with its defaults apart from `options`."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    try:
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def gunicorn_server(path: Path, port: int) -> Iterator[None]:
    """gunicorn in a process, at both addresses."""
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--bind",
        f"unix:{path}",
        "--bind",
        f"127.0.0.1:{port}",
        "wsgi_app:app",
    ]
    paths = os.pathsep.join([str(here), str(here.parents[1])])
    process = subprocess.Popen([*command, "--log-level", "critical"], env={**os.environ, "PYTHONPATH": paths}, cwd=here)
    try:
        deadline = time.monotonic() + 20
        while not _listens(port):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def get(url: str, headers: dict[str, str] | list[tuple[str, str]] | None = None, method: str = "GET") -> httpx.Response:
    return httpx.request(method, url, headers=headers, timeout=20)


def who(url: str, headers: Any = None) -> Any:
    """The user of an unguarded request; None if it has no identity. Then no identity header may be left."""
    content = get(url, headers).raise_for_status().json()
    if content["identity"] is None:
        assert content["names"] == []
        return None
    return content["identity"]["user"]


def test_asgi_behind_a_unix_socket_gets_the_identity_that_keyproxy_verified(site: Site) -> None:
    with uvicorn_server(asgi_app(Trust.unix()), uds=str(site.path)):
        own = get(f"{site.origin}/me", site.live).json()["identity"]
        key_id = own.pop("key_id")
        assert own == {**SERVICE_IDENTITY, "user": "u_service_acme", "is_test": False, "actor": None}
        assert key_id.startswith("key_")
        # keyproxy replaces what clients send in any spelling.
        spoofed = {**site.live, **SPOOFED, "X_Keyproxy_User": "u_admin", "X.Keyproxy.User": "u_admin"}
        assert who(f"{site.origin}/open", spoofed) == "u_service_acme"
        refused = get(f"{site.origin}/purge", site.live)
        assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_scope")
        assert get(f"{site.origin}/jobs", site.live, "POST").status_code == 200
        assert get(f"{site.origin}/me", SPOOFED).json()["code"] == "api_key_missing"


def test_identity_of_a_key_that_acts_names_user_and_actor(site: Site, deployment: Deployment) -> None:
    token = {"Authorization": f"Bearer {deployment.admin_token_file.read_text()}"}
    user = {"id": "u_42", "tenant": "acme"}
    created = httpx.post(f"{deployment.admin_url}/v1/users", json=user, headers=token)
    assert created.status_code in (200, 201, 409), created.text
    acting = {**site.live, "X-Keyproxy-Act-For": "u_42"}
    with uvicorn_server(asgi_app(Trust.unix()), uds=str(site.path)):
        found = get(f"{site.origin}/me", acting).json()["identity"]
    assert (found["user"], found["actor"], found["tenant"]) == ("u_42", "u_service_acme", "acme")
    with uvicorn_server(asgi_app(Trust.signed(site.jwks_url)), uds=str(site.path)):
        assert get(f"{site.origin}/me", acting).json()["identity"] == found


def test_asgi_on_loopback_gets_the_identity_and_trusts_no_rewritten_peer(site: Site) -> None:
    app = asgi_app(Trust.loopback())
    with uvicorn_server(app, port=site.port, proxy_headers=False):
        found = get(f"{site.origin}/me", site.test).json()["identity"]
        assert (found["user"], found["is_test"]) == ("u_service_acme", True)
    # Every peer may state the client's address: what a client states must not make it a trusted peer.
    with uvicorn_server(app, port=site.port, forwarded_allow_ips="*"):
        for forwarded in (
            "127.0.0.1",
            "127.0.0.1:40000",
            "[::1]:40000",
            "127.0.0.1:4_0000, 10.0.0.1",
            "10.0.0.1:40000",
        ):
            assert who(f"{site.direct}/open", {**SPOOFED, "X-Forwarded-For": forwarded}) is None
        assert who(f"{site.origin}/open", site.test) is None
        assert (
            get(f"{site.direct}/me", {**SPOOFED, "X-Forwarded-For": "127.0.0.1:1"}).json()["code"] == "identity_missing"
        )


def test_loopback_trusts_only_its_networks_for_a_peer_past_the_proxy(site: Site) -> None:
    with uvicorn_server(asgi_app(Trust.loopback(["10.0.0.0/8"])), port=site.port, proxy_headers=False):
        assert who(f"{site.direct}/open", SPOOFED) is None
        assert get(f"{site.direct}/me", SPOOFED).status_code == 401


def test_unix_trusts_no_tcp_peer(site: Site) -> None:
    with uvicorn_server(asgi_app(Trust.unix()), port=site.port):
        assert who(f"{site.direct}/open", SPOOFED) is None
        assert who(f"{site.origin}/open", site.test) is None


def test_repeated_and_misspelled_headers_of_a_trusted_peer_are_refused(site: Site) -> None:
    with uvicorn_server(asgi_app(Trust.unix()), uds=str(site.path)), site.socket_client() as client:
        for name in ("X-Keyproxy-User", "X_Keyproxy_User", "x.keyproxy.user"):
            response = client.get("/open", headers=[*SPOOFED.items(), (name, "u_1")])
            assert (response.status_code, response.json()["code"]) == (400, "identity_invalid")


def test_assertion_is_trusted_from_any_peer_and_nothing_else_is(site: Site) -> None:
    seen: list[str] = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.extend(value.decode() for name, value in scope["headers"] if name == b"x-keyproxy-assertion")
        await app(scope, receive, send)

    app = asgi_app(Trust.signed(site.jwks_url))
    with uvicorn_server(note, port=site.port, forwarded_allow_ips="*"):
        assert get(f"{site.origin}/me", site.test).json()["identity"]["user"] == "u_service_acme"
        assertion = {"X-Keyproxy-Assertion": seen[0]}
        assert who(f"{site.direct}/open", assertion) == "u_service_acme"
        assert who(f"{site.direct}/open", {**assertion, **SPOOFED}) is None
        assert who(f"{site.direct}/open", [*assertion.items(), *assertion.items()]) is None
        assert who(f"{site.direct}/open", SPOOFED) is None
        assert who(f"{site.direct}/open", {"X-Keyproxy-Assertion": f"{seen[0][:-4]}AAAA"}) is None
        codes = [get(f"{site.direct}/me", one).json()["code"] for one in (SPOOFED, {**assertion, **SPOOFED})]
        assert codes == ["identity_missing", "identity_untrusted"]


def test_websocket_gets_the_identity_or_is_refused(site: Site) -> None:
    def connect(url: str, headers: dict[str, str] | None = None) -> str:
        target = url.replace("http://", "ws://") + "/ws"
        with websockets.sync.client.connect(target, additional_headers=headers, proxy=None) as tunnel:
            return str(tunnel.recv(10))

    with uvicorn_server(asgi_app(Trust.loopback()), port=site.port, proxy_headers=False):
        assert connect(site.origin, site.test) == "u_service_acme"
        with pytest.raises(InvalidStatus) as caught:
            connect(site.direct)
        assert caught.value.response.status_code == 403


def test_wsgi_gets_the_identity_that_keyproxy_verified_and_trusts_no_other_peer(site: Site) -> None:
    misspelled = {**SPOOFED, "X_Keyproxy_User": "u_admin"}
    with gunicorn_server(site.path, site.port), site.socket_client() as client:
        assert who(f"{site.origin}/unix", {**site.live, **misspelled}) == "u_service_acme"
        assert who(f"{site.origin}/loopback", {**site.test, **misspelled}) == "u_service_acme"
        # The socket is no address, and the address no socket.
        assert who(f"{site.origin}/loopback", site.live) is None
        assert who(f"{site.origin}/unix", site.test) is None
        assert who(f"{site.direct}/unix", misspelled) is None
        assert who(f"{site.direct}/private", misspelled) is None
        response = client.get("/unix", headers=[*SPOOFED.items(), ("X-Keyproxy-User", "u_1")])
        assert (response.status_code, response.json()["code"]) == (400, "identity_invalid")
