"""`keyproxy authorize` as users run it: TLS, clients with certificates, reload, conflicts, health, shutdown."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import asyncpg
import pytest
import trustme

from keyproxy.authorize.app import AuthorizationServer, RejectedConfig
from keyproxy.config.oauth.oauth_settings import OAuthLogin, OAuthSettings
from keyproxy.config.schema import Settings
from keyproxy.oauth.client import row_id
from keyproxy.store.postgres import migrations, scratch_databases
from keyproxy.wire.tls import TlsError
from tests.acceptance.conftest import clean_environment
from tests.authorize.processes import Process, started
from tests.rawhttp import free_port
from tests.server import Server
from tests.store.harness import Sql, add_user
from tests.waiting import until

METADATA = "/.well-known/oauth-authorization-server"


@dataclass
class Host:
    """The running process, with certificates for both listeners."""

    process: Process
    config: Path
    dsn: str
    port: int
    mtls_port: int
    ops: str
    authority: trustme.CA
    worker: trustme.LeafCert

    def trusting(self, *, shows_certificate: bool = False) -> ssl.SSLContext:
        """A context of a client."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if shows_certificate:
            self.worker.configure_cert(context)
        return context

    async def call(
        self, path: str, form: dict[str, str] | None = None, *, is_mtls: bool = False, shows_certificate: bool = False
    ) -> tuple[int, Any]:
        """(status, JSON) of a request to one of the listeners."""
        url = f"https://127.0.0.1:{self.mtls_port if is_mtls else self.port}{path}"
        connector = aiohttp.TCPConnector(ssl=self.trusting(shows_certificate=shows_certificate))
        data = None if form is None else urlencode(form)
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        method = "GET" if form is None else "POST"
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, url, data=data, headers=headers) as response,
        ):
            return response.status, await response.json()

    async def of_ops(self, path: str) -> tuple[int, str]:
        """(status, text) of a page of the ops listener."""
        async with aiohttp.ClientSession() as session, session.get(self.ops + path) as response:
            return response.status, await response.text()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command with this configuration."""
        command = [sys.executable, "-m", "keyproxy", *arguments, "--config", str(self.config)]
        environment = clean_environment(self.config.parent)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def host(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One process for all tests of this module."""
    home, name = tmp_path_factory.mktemp("authorize"), f"kp_test_authorize_{secrets.token_hex(4)}"
    asyncio.run(scratch_databases.create(postgres.dsn("postgres"), name))
    asyncio.run(migrations.migrate(postgres.dsn(name)))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(home / "ca.pem"))
    server = authority.issue_cert("127.0.0.1")
    server.private_key_and_cert_chain_pem.write_to_path(str(home / "server.pem"))
    (home / "secret").write_text(secrets.token_hex(32))
    port, mtls_port, ops_port = free_port(), free_port(), free_port()
    issuer = f"https://127.0.0.1:{port}"
    oauth = {
        "address": f"127.0.0.1:{port}",
        "ops_address": f"127.0.0.1:{ops_port}",
        "tls_certificate_file": str(home / "server.pem"),
        "mtls_address": f"127.0.0.1:{mtls_port}",
        "mtls_client_ca_file": str(home / "ca.pem"),
        "issuer": issuer,
        "resource": f"{issuer}/mcp",
        "scopes": ["jobs:write"],
        "secret_file": str(home / "secret"),
    }
    lines = ["[store]", f"dsn = {json.dumps(postgres.dsn(name))}", "[oauth]"]
    config = home / "keyproxy.toml"
    config.write_text("\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in oauth.items())]))
    ops = f"http://127.0.0.1:{ops_port}"
    try:
        with started("authorize", config, f"{ops}/livez") as process:
            worker = authority.issue_cert("worker.example")
            yield Host(process, config, postgres.dsn(name), port, mtls_port, ops, authority, worker)
    finally:
        asyncio.run(scratch_databases.drop(postgres.dsn("postgres"), name))


@pytest.fixture
async def sql(host: Host) -> AsyncIterator[Sql]:
    """A connection of any SQL client."""
    connection = await asyncpg.connect(host.dsn)
    yield connection
    await connection.close()


async def test_ops_listener_shows_health_and_metrics_and_no_endpoint(host: Host) -> None:
    assert await host.of_ops("/livez") == (200, '{"status":"ok"}')
    status, ready = await host.of_ops("/readyz")
    assert (status, json.loads(ready)["checks"]["store"]) == (200, {"status": "ok"})
    assert (await host.call(METADATA))[0] == 200
    status, page = await host.of_ops("/metrics")
    assert 'keyproxy_oauth_requests_total{endpoint="metadata",outcome="ok"}' in page
    assert "keyproxy_store_up 1.0" in page
    for path in (METADATA, "/oauth/token", "/jwks.json"):
        assert (await host.of_ops(path))[0] == 404


async def test_client_with_a_certificate_gets_a_token_that_is_bound_to_it(host: Host, sql: Sql) -> None:
    await add_user(sql, "u_worker")
    await sql.execute(
        "INSERT INTO keyproxy.oauth_clients (id, client_id, kind, auth_method, tls_subject)"
        " VALUES ($1, 'worker', 'registered', 'tls_client_auth', 'dns:worker.example')",
        row_id("worker"),
    )
    await sql.execute(
        "INSERT INTO keyproxy.oauth_grants (id, user_id, client_id, resource, scopes, is_service)"
        " VALUES ($1, 'u_worker', $2, $3, '{jobs:write}', true)",
        f"gra_{1:022d}", row_id("worker"), f"https://127.0.0.1:{host.port}/mcp",
    )  # fmt: skip
    form = {"grant_type": "client_credentials", "client_id": "worker"}
    status, content = await host.call("/oauth/token", form, is_mtls=True, shows_certificate=True)
    assert (status, content.get("token_type")) == (200, "Bearer"), content
    certificate = ssl.PEM_cert_to_DER_cert(host.worker.cert_chain_pems[0].bytes().decode())
    digest = hashlib.sha256(content["access_token"].encode()).digest()
    bound_to = await sql.fetchval("SELECT bound_to FROM keyproxy.oauth_access_tokens WHERE digest = $1", digest)
    assert bound_to == hashlib.sha256(certificate).digest()

    def is_logged() -> bool:
        parties = f'"grant_type":"client_credentials","client":"{row_id("worker")}","user":"u_worker","status":200'
        return parties in host.process.out.read_text()

    await until(is_logged, "the request is logged with its parties")
    # The other listener verifies no certificates, so that the client cannot authenticate there.
    status, content = await host.call("/oauth/token", form, shows_certificate=True)
    assert (status, content["error"]) == (401, "invalid_client")


async def test_listener_for_certificates_requires_one_and_serves_machines_only(host: Host) -> None:
    with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
        await host.call("/oauth/token", {}, is_mtls=True)
    for path in (METADATA, "/oauth/authorize", "/oauth/register"):
        assert (await host.call(path, is_mtls=True, shows_certificate=True))[0] == 404
    for path in ("/oauth/token", "/token", "/oauth/revoke", "/oauth/introspect"):
        status, content = await host.call(path, {}, is_mtls=True, shows_certificate=True)
        assert (status, content["error"]) in ((400, "invalid_request"), (401, "invalid_client")), path
    aliases = (await host.call(METADATA))[1]["mtls_endpoint_aliases"]
    assert aliases["token_endpoint"] == f"https://127.0.0.1:{host.mtls_port}/oauth/token"


async def test_second_process_on_the_same_address_is_refused(host: Host) -> None:
    refused = await asyncio.to_thread(host.run, "authorize")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "oauth.address" in refused.stderr
    assert f"a running `keyproxy authorize` (pid {host.process.running.pid})" in refused.stderr


async def test_health_finds_the_process_by_its_configuration(host: Host) -> None:
    health = await asyncio.to_thread(host.run, "health")
    assert health.returncode == 0, health.stderr
    assert f"`keyproxy authorize` (pid {host.process.running.pid}) is live" in health.stderr


async def test_reload_applies_a_good_configuration_and_rejects_a_bad_one(host: Host) -> None:
    before = host.config.read_text()
    host.config.write_text(before.replace('["jobs:write"]', '["jobs:write", "jobs:read"]'))
    os.kill(host.process.running.pid, signal.SIGHUP)

    async def has_scope() -> bool:
        return "jobs:read" in (await host.call(METADATA))[1]["scopes_supported"]

    await until(has_scope, "the configuration is reloaded")
    secret = host.config.with_name("secret")
    secret.write_text("short")
    os.kill(host.process.running.pid, signal.SIGHUP)
    await asyncio.to_thread(host.process.wait_logged, "reload rejected: oauth.secret_file")
    secret.write_text(secrets.token_hex(32))
    host.config.write_text(before.replace(f":{host.mtls_port}", ":1"))
    os.kill(host.process.running.pid, signal.SIGHUP)
    await asyncio.to_thread(host.process.wait_logged, "cannot change in a reload")
    host.config.write_text(before)
    assert await has_scope()


async def test_reload_verifies_certificates_of_clients_by_the_new_authority(host: Host) -> None:
    authorities = host.config.with_name("ca.pem")

    async def is_accepted() -> bool:
        try:
            return (await host.call("/oauth/token", {}, is_mtls=True, shows_certificate=True))[0] in (400, 401)
        except (aiohttp.ClientError, ssl.SSLError, ConnectionError):
            return False

    async def is_refused() -> bool:
        return not await is_accepted()

    for authority, is_expected in ((trustme.CA(), is_refused), (host.authority, is_accepted)):
        authority.cert_pem.write_to_path(str(authorities))
        os.kill(host.process.running.pid, signal.SIGHUP)
        await until(is_expected, "the new authority is used")


@pytest.mark.parametrize(
    ("oauth", "login", "reason"),
    [
        ({"resource": ""}, {}, "oauth.resource: is not set"),
        ({"secret_file": "/nowhere"}, {}, "oauth.secret_file: cannot be read"),
        ({"secret_previous_file": "/nowhere"}, {}, "oauth.secret_previous_file: cannot be read"),
        ({"tls_certificate_file": "/nowhere"}, {}, "oauth.tls_certificate_file: /nowhere"),
        ({"document_ca_file": "/nowhere"}, {}, "oauth.document_ca_file: "),
        ({"mtls_address": "127.0.0.1:0"}, {}, "oauth.mtls_address: needs oauth.tls_certificate_file"),
        ({}, {"kind": "oidc", "client_secret_file": "/nowhere"}, "oauth.login.client_secret_file: /nowhere"),
        ({}, {"kind": "oidc", "ca_file": "/nowhere"}, "oauth.login.ca_file: /nowhere"),
    ],
)
def test_file_that_cannot_be_used_keeps_the_process_from_starting(
    tmp_path: Path, oauth: dict[str, str], login: dict[str, str], reason: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s" * 32)
    usual = {"issuer": "https://mcp.example.com", "resource": "https://mcp.example.com/mcp", "secret_file": str(secret)}
    settings = Settings(oauth=OAuthSettings(**(usual | oauth)), oauth_login=OAuthLogin(**login))  # type: ignore[arg-type]
    with pytest.raises((RejectedConfig, TlsError), match=reason):
        AuthorizationServer(settings, "postgresql:///nowhere")
