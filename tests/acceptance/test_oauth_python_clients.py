"""The Python SDK of MCP and FastMCP connect users, in every order in which clients call the authorization server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import fastmcp
import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fastmcp.client.auth import OAuth
from jwt.algorithms import ECAlgorithm
from key_value.aio.stores.memory import MemoryStore
from mcp.client.auth import OAuthClientProvider, TokenStorage
from mcp.client.auth.extensions.client_credentials import (
    ClientCredentialsOAuthProvider,
    PrivateKeyJWTOAuthProvider,
    SignedJWTParameters,
)
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import (
    AuthorizationCodeResult,
    OAuthClientInformationFull,
    OAuthClientMetadata,
    OAuthToken,
)
from pydantic import AnyUrl
from yarl import URL

from tests.acceptance.oauth_deployment import Deployment
from tests.authorize.user_agent import browsing
from tests.store.harness import Sql
from tests.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:Using in-memory token storage")


@pytest.fixture
async def sql(deployment: Deployment) -> AsyncIterator[Sql]:
    """A connection of any SQL client."""
    connection = await asyncpg.connect(deployment.dsn)
    yield connection
    await connection.close()


class FromAddress(httpx2.AsyncHTTPTransport):
    """Sends requests that a trusted proxy attributes to an address, so that devices do not share rate limits."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.headers["X-Forwarded-For"] = self._address
        return await super().handle_async_request(request)


class Memory(TokenStorage):
    """What a device keeps."""

    def __init__(self) -> None:
        self.tokens: OAuthToken | None = None
        self.client: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self.client

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self.client = client_info


_addresses = iter(range(1, 250))


class Device:
    """A device with the Python SDK, and its user with a browser."""

    def __init__(self, deployment: Deployment, key: str, name: str = "SDK") -> None:
        self.memory = Memory()
        self.address = f"192.0.2.{next(_addresses)}"
        self.logins = 0
        self._deployment = deployment
        self._key = key
        self._name = name
        self._location = URL()
        self.provider = self._provider()

    async def call(self, call: str) -> str:
        """Call the tool; returns the user that the MCP server sees."""
        async with (
            httpx2.AsyncClient(auth=self.provider, transport=FromAddress(self.address), timeout=30) as http,
            Client(streamable_http_client(self._deployment.resource, http_client=http)) as client,
        ):
            result = await client.call_tool("whoami", {"call": call})
            return str(result.content[0].text)  # type: ignore[union-attr]

    def restart(self) -> None:
        """Restart the program: it has what it has kept."""
        self.provider = self._provider()

    def _provider(self) -> OAuthClientProvider:
        metadata = OAuthClientMetadata(
            client_name=self._name,
            redirect_uris=[AnyUrl("http://localhost:3118/callback")],
            grant_types=["authorization_code", "refresh_token"],
            response_types=["code"],
            token_endpoint_auth_method="none",
        )
        return OAuthClientProvider(self._deployment.resource, metadata, self.memory, self._redirect, self._callback)

    async def _redirect(self, url: str) -> None:
        self.logins += 1
        async with browsing(self._key, self.address) as agent:
            self._location = URL(await agent.decide(url))

    async def _callback(self) -> AuthorizationCodeResult:
        query = self._location.query
        return AuthorizationCodeResult(code=query["code"], state=query["state"], iss=query["iss"])


async def _counts(sql: Sql, user: str) -> tuple[int, int, int]:
    """The numbers of clients, grants and sessions of a user."""
    row = await sql.fetchrow(
        "SELECT count(DISTINCT g.client_id), count(DISTINCT g.id), count(s.id) FROM keyproxy.oauth_grants AS g"
        " LEFT JOIN keyproxy.oauth_sessions AS s ON s.grant_id = g.id WHERE g.user_id = $1",
        user,
    )
    assert row is not None
    return row[0], row[1], row[2]


async def test_sdk_registers_connects_its_user_and_stays_connected_without_another_login(
    deployment: Deployment, sql: Sql
) -> None:
    device = Device(deployment, await deployment.key("u_first"))
    assert await device.call("first") == "u_first"
    session = await sql.fetchval(
        "SELECT s.id FROM keyproxy.oauth_sessions AS s JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id"
        " WHERE g.user_id = 'u_first'"
    )
    assert deployment.users["first"] == ("u_first", session)
    tokens = device.memory.tokens
    device.provider.context.token_expiry_time = 1.0
    assert await device.call("refreshed") == "u_first"
    assert device.memory.tokens is not None
    assert device.memory.tokens != tokens
    device.restart()
    assert await device.call("restarted") == "u_first"
    assert device.logins == 1
    assert await _counts(sql, "u_first") == (1, 1, 1)


async def test_client_that_kept_its_id_authorizes_without_registering(deployment: Deployment, sql: Sql) -> None:
    first = Device(deployment, await deployment.key("u_kept"), "Kept")
    assert await first.call("a") == "u_kept"
    await sql.execute("DELETE FROM keyproxy.oauth_clients")
    registered = len(deployment.requests("/oauth/register"))
    second = Device(deployment, await deployment.key("u_other"), "Kept")
    second.memory.client = first.memory.client
    assert await second.call("b") == "u_other"
    assert len(deployment.requests("/oauth/register")) == registered


async def test_registering_again_gives_the_same_id_and_no_second_client(deployment: Deployment, sql: Sql) -> None:
    key = await deployment.key("u_again")
    devices = [Device(deployment, key, "Again") for _ in range(2)]
    for device in devices:
        assert await device.call("again") == "u_again"
    first, second = (device.memory.client for device in devices)
    assert first is not None
    assert second is not None
    assert first.client_id == second.client_id
    assert await _counts(sql, "u_again") == (1, 1, 2)


async def test_twenty_devices_at_once_are_sessions_of_one_grant(deployment: Deployment, sql: Sql) -> None:
    key = await deployment.key("u_devices")
    devices = [Device(deployment, key, "Devices") for _ in range(20)]
    assert set(await asyncio.gather(*(device.call("devices") for device in devices))) == {"u_devices"}
    assert await _counts(sql, "u_devices") == (1, 1, 20)


async def test_fifty_registrations_store_nothing(deployment: Deployment, sql: Sql) -> None:
    before = await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_clients")
    async with httpx2.AsyncClient() as http:
        ids = set()
        for number in range(50):
            reply = await http.post(
                f"{deployment.issuer}/register",
                json={"client_name": f"Program {number}", "redirect_uris": ["http://127.0.0.1/cb"]},
                headers={"X-Forwarded-For": f"198.51.100.{number}"},
            )
            assert reply.status_code == 201, reply.text
            ids.add(reply.json()["client_id"])
    assert len(ids) == 50
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_clients") == before


async def test_deletion_of_all_clients_costs_one_login_and_no_registration(deployment: Deployment, sql: Sql) -> None:
    device = Device(deployment, await deployment.key("u_deleted"), "Deleted")
    assert await device.call("before") == "u_deleted"
    await sql.execute("DELETE FROM keyproxy.oauth_clients")
    registered = len(deployment.requests("/oauth/register"))

    # Within a second the proxy refuses the token that the device still has; then the device connects again by itself.
    async with asyncio.timeout(10):
        while device.logins == 1:
            assert await device.call("after") == "u_deleted"
    assert device.logins == 2
    assert len(deployment.requests("/oauth/register")) == registered
    assert await _counts(sql, "u_deleted") == (1, 1, 1)


def _open_in_browser(key: str, address: str) -> Callable[..., bool]:
    """In place of the browser of this machine: decides in a thread, and follows the redirect to the program."""

    async def visit(url: str) -> None:
        async with browsing(key, address) as agent, httpx2.AsyncClient() as http:
            await http.get(await agent.decide(url))

    def open_(url: str, *_more: Any) -> bool:
        threading.Thread(target=lambda: asyncio.run(visit(url)), daemon=True).start()
        return True

    return open_


@contextlib.asynccontextmanager
async def fast_client(deployment: Deployment, **more: Any) -> AsyncIterator[fastmcp.Client[Any]]:
    auth = OAuth(deployment.resource, token_storage=more.pop("storage", None) or MemoryStore(), **more)
    async with fastmcp.Client(deployment.resource, auth=auth) as client:
        yield client


@pytest.mark.parametrize("kind", ["value", "document"])
async def test_fastmcp_connects_its_user_with_registration_and_with_a_document(
    deployment: Deployment, sql: Sql, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    user = f"u_fast_{kind}"
    monkeypatch.setattr(webbrowser, "open", _open_in_browser(await deployment.key(user), "203.0.113.1"))
    more = {"client_metadata_url": f"{deployment.documents}/client.json"} if kind == "document" else {}
    async with fast_client(deployment, client_name="Fast", **more) as client:
        result = await client.call_tool("whoami", {"call": kind})
        assert result.content[0].text == user  # type: ignore[union-attr]
    kinds = await sql.fetch(
        "SELECT c.kind FROM keyproxy.oauth_grants AS g JOIN keyproxy.oauth_clients AS c ON c.id = g.client_id"
        " WHERE g.user_id = $1",
        user,
    )
    assert [row["kind"] for row in kinds] == [kind]


async def test_fastmcp_recovers_from_an_id_that_no_server_here_has_made(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webbrowser, "open", _open_in_browser(await deployment.key("u_stale"), "203.0.113.2"))
    storage = MemoryStore()
    stale = OAuth(deployment.resource, token_storage=storage)
    await stale.token_storage_adapter.set_client_info(
        OAuthClientInformationFull(
            client_id="an-id-of-the-server-before",
            redirect_uris=[AnyUrl("http://localhost:3118/callback")],
            token_endpoint_auth_method="none",
        )
    )
    async with fast_client(deployment, storage=storage) as client:
        result = await client.call_tool("whoami", {"call": "stale"})
        assert result.content[0].text == "u_stale"  # type: ignore[union-attr]


def _machine(deployment: Deployment, client_id: str, method: str, secret: str, key: str) -> OAuthClientProvider:
    """The SDK's provider for a machine that authenticates itself by this method."""
    if method == "private_key_jwt":
        signing = SignedJWTParameters(issuer=client_id, subject=client_id, signing_key=key, signing_algorithm="ES256")
        return PrivateKeyJWTOAuthProvider(
            deployment.resource, Memory(), client_id, signing.create_assertion_provider(), issuer=deployment.issuer
        )
    return ClientCredentialsOAuthProvider(
        deployment.resource, Memory(), client_id, secret,
        token_endpoint_auth_method="client_secret_basic" if method == "client_secret_basic" else "client_secret_post",
        issuer=deployment.issuer,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "private_key_jwt"])
async def test_machine_gets_tokens_for_its_user_without_a_browser(deployment: Deployment, method: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    jwk = json.loads(ECAlgorithm.to_jwk(key.public_key()))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    keys = {"keys": [jwk | {"kid": "1", "use": "sig"}]} if method == "private_key_jwt" else None
    secret = await deployment.machine(f"machine-{method}", f"u_{method}", keys)
    provider = _machine(deployment, f"machine-{method}", method, secret, pem)
    async with (
        httpx2.AsyncClient(auth=provider, timeout=30) as http,
        Client(streamable_http_client(deployment.resource, http_client=http)) as client,
    ):
        result = await client.call_tool("whoami", {"call": method})
        assert result.content[0].text == f"u_{method}"  # type: ignore[union-attr]
        tokens = provider.context.current_tokens
        assert tokens is not None
        assert tokens.refresh_token is None


async def test_log_of_the_authorization_server_names_the_parties_and_no_secret(deployment: Deployment) -> None:
    device = Device(deployment, await deployment.key("u_logged"), "Logged")
    await device.call("logged")
    device.provider.context.token_expiry_time = 1.0
    await device.call("logged")

    def issued_lines() -> list[dict[str, Any]]:
        return [line for line in deployment.requests("/oauth/token") if line["user"] == "u_logged"]

    await until(lambda: len(issued_lines()) == 2, "both requests are logged")
    issued = issued_lines()
    assert [(line["grant_type"], line["status"]) for line in issued] == [
        ("authorization_code", 200),
        ("refresh_token", 200),
    ]
    assert all(line["client"].startswith("cli_") and line["peer"] == device.address for line in issued)
    text = deployment.log.read_text(encoding="utf-8")
    for secret in ("kp_access_", "kp_refresh_", "kp_live_", "code=", "verifier"):
        assert secret not in text
