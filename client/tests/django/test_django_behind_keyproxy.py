"""Requests through a real keyproxy to the test project in real servers, and past it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import django
import psycopg
import pytest
from django.contrib.auth import get_user_model

from deployment import VARIABLE, Deployment, clean_environment, free_port
from project.keys import issued_key
from project.requests import HEADERS

# Servers and peers do not depend on Django's version.
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(django.VERSION < (6,), reason="runs with the newest Django"),
    pytest.mark.usefixtures("committing_db"),
]


@dataclass(frozen=True)
class Server:
    """One way to serve the project. `is_trusted`: whether identities of keyproxy are accepted by that way."""

    command: tuple[str, ...]
    keyproxy: dict[str, Any]
    is_unix: bool = False
    is_trusted: bool = True


GUNICORN = ("gunicorn", "project.wsgi", "--threads", "2", "--log-level", "critical", "--bind", "{bind}")
UVICORN = ("uvicorn", "project.asgi:application", "--log-level", "critical", "--lifespan", "off", "{bind}")
# 127.0.0.2 is a peer that is not keyproxy.
NETWORK = {"TRUST": "loopback", "TRUST_NETWORKS": ["127.0.0.1/32"]}
SERVERS = {
    "gunicorn-loopback": Server(GUNICORN, NETWORK),
    "gunicorn-unix": Server(GUNICORN, {"TRUST": "unix"}, is_unix=True),
    "uvicorn-loopback": Server((*UVICORN, "--no-proxy-headers"), NETWORK),
    "uvicorn-loopback-rewriting": Server(UVICORN, NETWORK, is_trusted=False),
    "uvicorn-unix": Server(UVICORN, {"TRUST": "unix"}, is_unix=True),
    "uvicorn-signed": Server(UVICORN, {"TRUST": "signed"}),
}


@dataclass(frozen=True)
class Place:
    """Where the servers bind, one after the other, and the proxy before it."""

    path: str
    port: int
    origin: str


@pytest.fixture(scope="module")
def places(deployment: Deployment) -> Iterator[dict[bool, Place]]:
    """A place of each kind: True for the unix socket. A proxy takes longer to start than a server."""
    with tempfile.TemporaryDirectory() as home:
        path, port = f"{home}/app.sock", free_port()
        with contextlib.ExitStack() as stack:
            # A proxy is ready when its upstream accepts connections.
            with listening(socket.AF_UNIX, path), listening(socket.AF_INET, ("127.0.0.1", port)):
                unix = stack.enter_context(deployment.proxying(f"unix:{path}"))
                loopback = stack.enter_context(deployment.proxying(f"http://127.0.0.1:{port}"))
            Path(path).unlink()
            yield {True: Place(path, port, unix), False: Place(path, port, loopback)}


def listening(family: socket.AddressFamily, address: Any) -> socket.socket:
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen()
    return listener


@contextlib.contextmanager
def serving(server: Server, place: Place) -> Iterator[None]:
    """The project in this server."""
    is_uvicorn = server.command[0] == "uvicorn"
    if server.is_unix:
        bind = f"--uds={place.path}" if is_uvicorn else f"unix:{place.path}"
    else:
        bind = f"--port={place.port}" if is_uvicorn else f"127.0.0.1:{place.port}"
    environment = clean_environment() | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "DJANGO_SETTINGS_MODULE": "project.settings",
        "TEST_KEYPROXY": json.dumps(server.keyproxy),
        VARIABLE: os.environ[VARIABLE],
    }
    command = [sys.executable, "-m", *(part.format(bind=bind) for part in server.command)]
    process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parent)
    try:
        await_connection(process, place.path if server.is_unix else ("127.0.0.1", place.port))
        yield
    finally:
        process.terminate()
        process.wait(20)


def await_connection(process: subprocess.Popen[bytes], address: Any) -> None:
    deadline = time.monotonic() + 30
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    while True:
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.connect(address)
            return
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def get(origin: str, path: str, headers: dict[str, str], source: str = "127.0.0.1") -> tuple[int, Any]:
    address = urlsplit(origin)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=20, source_address=(source, 0))
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.mark.parametrize("name", SERVERS)
def test_an_identity_of_keyproxy_arrives_and_no_other(
    deployment: Deployment, places: dict[bool, Place], name: str
) -> None:
    server = SERVERS[name]
    place = places[server.is_unix]
    origin = place.origin
    ada = get_user_model().objects.create_user(f"ada-{name}")
    user = f"u_{ada.pk}"
    own = {"Authorization": f"Api-Key {issued_key(deployment, user)}"}
    service = deployment.service_key_file().read_text(encoding="utf-8").strip()
    acting = {"Authorization": f"Api-Key {service}", "X-Keyproxy-Act-For": user}
    rewriting = {"X-Forwarded-For": "127.0.0.1:4000", "X-Forwarded-Port": "4000"}
    with serving(server, place):
        for extra in ({}, HEADERS, {"x_keyproxy_user": "u_1"}, rewriting):
            status, found = get(origin, "/seen", own | extra)
            if not server.is_trusted:
                assert (status, found["identity"], found["meta"]) == (200, None, [])
                assert get(origin, "/keyed", own | extra)[0] == 401
                continue
            assert status == 200, found
            assert found["identity"]["user"] == found["acting"]["user"] == user
            assert (found["identity"]["tenant"], found["identity"]["scopes"]) == ("acme", ["jobs:write"])
        if server.is_trusted:
            found = get(origin, "/seen", acting)[1]["identity"]
            assert (found["user"], found["actor"]) == (user, "u_service_acme")
            assert get(origin, "/authenticated", own)[1]["user"] == ada.username
            assert get(origin, "/scoped", own)[0] == 200
        if not server.is_unix:
            assert_past_keyproxy(f"http://127.0.0.1:{place.port}")
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute("DELETE FROM keyproxy.users WHERE id = %s", [user])


def assert_past_keyproxy(upstream: str) -> None:
    """Requests to the server itself, by a peer that is not keyproxy, have no identity."""
    for extra in ({}, {"X-Forwarded-For": "127.0.0.1"}, {"X-Forwarded-For": "127.0.0.1:4000"}):
        status, found = get(upstream, "/seen", HEADERS | extra, source="127.0.0.2")
        assert (status, found["identity"], found["meta"], found["headers"]) == (200, None, [], [])
        assert get(upstream, "/keyed", HEADERS | extra, source="127.0.0.2")[0] == 401
