"""Outgoing requests of every HTTP client through a real keyproxy."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI

from deployment import Deployment
from keyproxy_client import http
from keyproxy_client.acting import acting_as
from keyproxy_client.asgi import IdentityMiddleware
from keyproxy_client.identity import Trust
from outgoing_clients import Call, Client
from scripted_server import ScriptedServer


class Admin:
    """The admin API of the deployment."""

    def __init__(self, deployment: Deployment) -> None:
        self._url = deployment.admin_url
        self._token = deployment.admin_token_file.read_text(encoding="ascii")

    def send(self, method: str, path: str, content: Any = None) -> Any:
        """The JSON of the response to a request that must succeed."""
        request = urllib.request.Request(
            f"{self._url}{path}",
            method=method,
            data=None if content is None else json.dumps(content).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read() or b"null")

    def key(self, **wish: Any) -> Any:
        """A new key of the service of acme, which may act for its users."""
        wished = {
            "user": "u_service_acme",
            "scopes": ["jobs:write"],
            "acts_for": "tenant",
            "expires_in_seconds": 86_400,
            **wish,
        }
        return self.send("POST", "/v1/keys", wished)


@pytest.fixture(scope="module")
def admin(deployment: Deployment) -> Admin:
    """The admin API, with a user of acme and one of globex."""
    found = Admin(deployment)
    for user, tenant in (("u_out", "acme"), ("u_foreign", "globex")):
        found.send("POST", "/v1/users", {"id": user, "tenant": tenant})
    found.send(
        "PUT", "/v1/plans/slow", {"limits": [{"measure": "request-rate", "per": "minute", "amount": 15, "burst": 1}]}
    )
    return found


def of_files(deployment: Deployment) -> dict[str, Any]:
    """The options of a client with the service keys of the deployment."""
    return {
        "origin": deployment.origin,
        "key": deployment.service_key_pattern,
        "test_key": deployment.service_test_key_pattern,
    }


@pytest.mark.parametrize("test", [False, True])
def test_upstream_sees_the_acting_user_and_its_mode(
    client: Client, deployment: Deployment, admin: Admin, test: bool
) -> None:
    with acting_as("u_out", "acme", test=test):
        result = client(Call("/v1/ai/jobs", "POST", b'{"job_id": 7}'), of_files(deployment))
    assert result.status == 200
    seen = {name: result.seen_headers(f"X-Keyproxy-{name}") for name in ("User", "Tenant", "Actor", "Test", "Act-For")}
    assert seen == {
        "User": ["u_out"], "Tenant": ["acme"], "Actor": ["u_service_acme"], "Test": [str(test).lower()], "Act-For": [],
    }  # fmt: skip
    assert (result.seen["body"], result.seen_headers("Authorization")) == ('{"job_id": 7}', [])


def test_request_without_act_for_has_the_identity_of_the_key(client: Client, deployment: Deployment) -> None:
    result = client(Call("/"), {**of_files(deployment), "key": deployment.service_key_file("globex"), "act_for": None})
    assert (result.seen_headers("X-Keyproxy-User"), result.seen_headers("X-Keyproxy-Actor")) == (
        ["u_service_globex"],
        [],
    )


def test_refused_delegation_is_returned(client: Client, deployment: Deployment, admin: Admin) -> None:
    with acting_as("u_foreign", "acme"):
        result = client(Call("/"), of_files(deployment))
    assert (result.status, json.loads(result.body)["code"]) == (403, "delegation_refused")


def test_revoked_key_is_replaced_by_the_one_read_again(client: Client, deployment: Deployment, admin: Admin) -> None:
    old = admin.key()
    new = admin.send("POST", f"/v1/keys/{old['id']}/rotate", {"grace_seconds": 3_600})
    admin.send("POST", f"/v1/keys/{old['id']}/revoke", {"reason": "test"})
    found = iter([old["secret"], new["secret"]])
    chosen = {"origin": deployment.origin, "key": lambda: next(found), "act_for": "u_out"}
    result = client(Call("/", "POST", b"body"), chosen)
    assert (result.status, result.seen_headers("X-Keyproxy-Key-Id")) == (200, [new["id"]])


def test_rate_limit_is_waited_for_once(
    client: Client, deployment: Deployment, admin: Admin, waits: list[float]
) -> None:
    key = admin.key(plan="slow")
    chosen = {"origin": deployment.origin, "key": key["secret"], "act_for": "u_out"}
    assert client(Call("/"), chosen).status == 200
    result = client(Call("/"), chosen)
    assert (result.status, json.loads(result.body)["code"]) == (429, "rate_limited")
    # The bucket gains one in 4 s.
    assert len(waits) == 1
    assert 1 <= waits[0] <= 4


def test_redirect_of_the_upstream_carries_nothing_elsewhere(
    client: Client, deployment: Deployment, admin: Admin, elsewhere: ScriptedServer
) -> None:
    path = f"/v1/jobs?status=307&header=Location:{elsewhere.origin}/there"
    with acting_as("u_out", "acme"):
        assert client(Call(path, "POST", b"body", follows=True), of_files(deployment)).status == 200
    assert [sent.credentials for sent in elsewhere.received] == [([], [])]


@pytest.mark.parametrize("path", ["/coroutine", "/thread", "/background"])
def test_request_of_a_request_acts_for_the_same_user(deployment: Deployment, admin: Admin, path: str) -> None:
    found = []

    def call() -> None:
        with http.requests_session(**of_files(deployment)) as session:
            found.append(session.post("/v1/ai/jobs", timeout=10).json())

    async def in_coroutine() -> None:
        async with http.httpx_async_client(**of_files(deployment)) as client:
            found.append((await client.post("/v1/ai/jobs")).json())

    def in_background(tasks: BackgroundTasks) -> None:
        tasks.add_task(call)

    app = FastAPI()
    app.add_middleware(IdentityMiddleware, trust=Trust.unix())
    for name, endpoint in (("/coroutine", in_coroutine), ("/thread", call), ("/background", in_background)):
        app.get(name)(endpoint)
    with acting_as("u_out", "acme"), http.httpx_client(**of_files(deployment)) as client:
        incoming = client.get("/").json()["headers"]
    asyncio.run(_served(app, path, [(name.lower().encode(), value.encode()) for name, value in incoming]))
    assert ["X-Keyproxy-User", "u_out"] in found[0]["headers"]


async def _served(app: FastAPI, path: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Serve one request that came over a unix socket."""
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers, "client": None}

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        assert message.get("status", 200) == 200

    await app({**scope, "server": ("/run/app.sock", None)}, receive, send)


def test_clients_share_the_certificates(deployment: Deployment) -> None:
    with http.httpx_client(**of_files(deployment)) as first, http.httpx_client(**of_files(deployment)) as second:
        assert isinstance(first, httpx.Client)
        assert (first.base_url, first.trust_env) == (httpx.URL(deployment.origin), False)
        assert repr(first.auth) == repr(second.auth) == f"KeyproxyAuth('{deployment.origin}')"
