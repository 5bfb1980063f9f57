"""`keyproxy admin` as users run it: a process, a configuration file, tokens created on the host, signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from click.testing import CliRunner

from keyproxy.admin.authentication import TokenFileError, file_digest
from keyproxy.cli import root
from tests.acceptance.conftest import Output, clean_environment
from tests.rawhttp import free_port
from tests.store.harness import Sql
from tests.waiting import until

TOKEN = "a-token-of-the-file-0123456789abcdefgh"


@dataclass
class Host:
    """A configuration, and the processes that run with it."""

    directory: Path
    dsn: str
    port: int

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.directory / "keyproxy.toml"

    def configure(self, **admin: str) -> None:
        """Write the configuration."""
        values = {"address": f"127.0.0.1:{self.port}"} | admin
        lines = ["[store]", f"dsn = {json.dumps(self.dsn)}", "[admin]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
        self.config.write_text("\n".join(lines) + "\n", encoding="utf-8")

    async def start(self, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        """Start a command."""
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "keyproxy",
            *arguments,
            "--config",
            str(self.config),
            env=clean_environment(self.directory) | environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str, **environment: str) -> Output:
        """Run a command to completion."""
        process = await self.start(*arguments, **environment)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        return Output(process.returncode or 0, out.decode(), err.decode())

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """`keyproxy admin` until the end of the context."""
        process = await self.start("admin")
        try:

            async def is_live() -> bool:
                return (await self.get("/livez"))[0] == 200

            await until(is_live, "the process is live", seconds=60, while_running=process)
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                await process.wait()

    async def get(self, path: str, token: str | None = None) -> tuple[int, Any]:
        """(status, JSON) of a page; (0, None) while nothing listens."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{self.port}{path}", headers=headers) as response,
            ):
                return response.status, await response.json(content_type=None)
        except aiohttp.ClientConnectionError:
            return 0, None


@pytest.fixture
def host(tmp_path: Path, dsn: str) -> Host:
    """A host with a configuration that has no token."""
    host = Host(tmp_path, dsn, free_port())
    host.configure()
    return host


async def test_a_token_created_on_the_host_works_until_it_is_revoked(host: Host) -> None:
    made = await host.run("admin", "token", "create", "--name", "ann", "--scope", "admin:read", "--json")
    assert made.status == 0, made.err
    token = made.json
    async with host.serving() as process:
        assert (await host.get("/v1/token"))[0] == 401
        status, result = await host.get("/v1/token", token["secret"])
        assert (status, result["id"], result["name"]) == (200, token["id"], "ann")
        listed = await host.run("admin", "token", "list", "--json")
        assert [one["id"] for one in listed.json] == [token["id"]]
        assert token["secret"] not in listed.out
        assert (await host.run("admin", "token", "revoke", token["id"])).status == 0
        assert (await host.get("/v1/token", token["secret"]))[1]["code"] == "token_revoked"
        assert (await host.get("/readyz"))[0] == 200
        process.send_signal(signal.SIGTERM)
        out, err = await process.communicate()
    assert process.returncode == 0
    assert [json.loads(line)["status"] for line in out.splitlines() if b"/v1/token" in line] == [401, 200, 401]
    assert token["secret"].encode() not in out + err


@pytest.mark.parametrize(
    ("scopes", "sentence"),
    [
        (["keys:*"], "not a scope; the scopes are admin:read"),
        (["tenant:acme"], "at least one scope"),
        (["keys:read", "tenant:a", "tenant:b"], "one tenant only"),
        (["keys:read", "tenant:"], "a tenant's id"),
    ],
)
def test_a_token_with_invalid_scopes_is_not_created(scopes: list[str], sentence: str) -> None:
    command = ["admin", "token", "create", *(word for scope in scopes for word in ("--scope", scope))]
    result = CliRunner().invoke(root, command)
    assert result.exit_code == 2
    assert sentence in result.output


async def test_without_any_token_it_does_not_start_off_loopback(host: Host) -> None:
    host.configure(address="0.0.0.0:0")
    output = await host.run("admin")
    assert (output.status, output.out) == (2, "")
    assert "is not loopback, and no admin token exists" in output.err
    assert len(output.err.splitlines()) == 1


async def test_an_invalid_token_file_is_reported(host: Host) -> None:
    host.configure(token_file=str(host.directory / "token"))
    with pytest.raises(TokenFileError, match="cannot be read"):
        file_digest(str(host.directory / "token"))
    (host.directory / "token").write_text("short")
    output = await host.run("admin")
    assert output.status == 2
    assert "32 to 512 characters" in output.err
    assert "short" not in output.err


async def test_a_new_token_in_the_file_takes_effect_after_sighup(host: Host) -> None:
    file = host.directory / "token"
    file.write_text(TOKEN + "\n")
    host.configure(token_file=str(file))
    async with host.serving() as process:
        assert (await host.get("/v1/tenants", TOKEN))[0] == 200
        file.write_text(TOKEN[::-1])
        os.kill(process.pid, signal.SIGHUP)

        async def is_accepted() -> bool:
            return (await host.get("/v1/tenants", TOKEN[::-1]))[0] == 200

        await until(is_accepted, "the new token is accepted", seconds=20)
        assert (await host.get("/v1/tenants", TOKEN))[0] == 401


async def test_tls_is_spoken_and_another_certificate_is_shown_after_sighup(host: Host) -> None:
    authority = trustme.CA()
    files = {name: host.directory / f"{name}.pem" for name in ("ca", "certificate", "key", "token")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    files["token"].write_text(TOKEN)

    def issue(name: str) -> None:
        made = authority.issue_cert("127.0.0.1", common_name=name)
        made.private_key_pem.write_to_path(str(files["key"]))
        files["certificate"].write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))

    async def shown() -> str:
        """The name on the certificate; empty while nothing listens."""
        trusting = ssl.create_default_context(cafile=str(files["ca"]))
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", host.port, ssl=trusting)
        except ConnectionRefusedError:
            return ""
        certificate = writer.get_extra_info("ssl_object").getpeercert()
        writer.close()
        return str(dict(pair for part in certificate["subject"] for pair in part)["commonName"])

    issue("first")
    host.configure(
        token_file=str(files["token"]), tls_certificate_file=str(files["certificate"]), tls_key_file=str(files["key"])
    )
    process = await host.start("admin")
    try:
        async with asyncio.timeout(60):
            while await shown() != "first":
                assert process.returncode is None
                await asyncio.sleep(0.05)
            url = f"https://127.0.0.1:{host.port}"
            result = await host.run(
                "tenant",
                "create",
                "acme",
                "--json",
                "--admin-url",
                url,
                KEYPROXY_ADMIN_TOKEN=TOKEN,
                SSL_CERT_FILE=str(files["ca"]),
            )
            assert result.json["id"] == "acme", result.err
            files["certificate"].write_text("no certificate")
            os.kill(process.pid, signal.SIGHUP)
            assert process.stderr is not None
            while b"reload rejected" not in (line := await process.stderr.readline()):
                assert line
            assert str(files["certificate"]).encode() in line
            assert await shown() == "first"
            issue("second")
            os.kill(process.pid, signal.SIGHUP)
            while await shown() != "second":
                await asyncio.sleep(0.05)
    finally:
        process.terminate()
        assert await process.wait() == 0


async def test_a_certificate_that_cannot_be_used_keeps_the_process_from_starting(host: Host) -> None:
    host.configure(tls_certificate_file="/nowhere.pem")
    output = await host.run("admin")
    assert (output.status, output.err) == (
        2,
        "keyproxy: admin.tls_certificate_file: /nowhere.pem: No such file or directory\n",
    )


async def test_commands_without_a_database_use_the_admin_api(host: Host) -> None:
    file = host.directory / "token"
    file.write_text(TOKEN)
    host.configure(token_file=str(file))
    url = f"http://127.0.0.1:{host.port}"
    async with host.serving():
        host.config.write_text("")
        made = await host.run("tenant", "create", "acme", KEYPROXY_ADMIN_TOKEN=TOKEN, KEYPROXY_ADMIN_URL=url)
        assert (made.status, made.err) == (0, "")
        refused = await host.run("tenant", "show", "nobody", "--admin-url", url, "--admin-token-file", str(file))
        assert (refused.status, refused.err) == (1, "keyproxy: there is no tenant 'nobody'\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tenant", "list", "--admin-url", "http://127.0.0.1:1"], "requires a token"),
        (["tenant", "list", "--admin-url", "ftp://a"], "is not a valid URL"),
    ],
)
def test_an_invalid_admin_url_or_a_missing_token_is_a_usage_error(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(root, arguments, env={"KEYPROXY_ADMIN_TOKEN": None})
    assert result.exit_code == 2
    assert sentence in result.output


async def test_a_stop_cuts_the_signing_key_to_the_end_of_the_last_token(host: Host, sql: Sql) -> None:
    directory = await host.run("tenant", "create", "acme")
    user = await host.run("user", "create", "u_1", "--tenant", "acme", "--scope", "a", "--json")
    assert (directory.status, user.status) == (0, 0)
    key = json.loads(user.out)["key"]["id"]
    secret = json.loads(
        (await host.run("admin", "token", "create", "--name", "t", "--scope", "keys:write", "--json")).out
    )
    async with host.serving():
        mint = ("agent", "token", "--key", key, "--agent", "crawler", "--scope", "a", "--ttl", "2m", "--json")
        environment = {"KEYPROXY_ADMIN_TOKEN": secret["secret"], "KEYPROXY_ADMIN_URL": f"http://127.0.0.1:{host.port}"}
        first = json.loads((await host.run(*mint, **environment)).out)
        second = json.loads((await host.run(*mint, **environment)).out)
        _, published = await host.get("/jwks.json")
        assert len(published["keys"]) == 1
        life = "SELECT extract(epoch FROM ends_at - created_at)::float8 FROM keyproxy.signing_keys"
        assert await sql.fetchval(life) == pytest.approx(25 * 3600, abs=1)
    assert first["expires_at"] <= second["expires_at"]
    ends = await sql.fetchval("SELECT ends_at FROM keyproxy.signing_keys")
    assert ends == datetime.fromisoformat(second["expires_at"])
