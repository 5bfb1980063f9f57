"""Without a configured database: which commands create the embedded one, which report its use, and which only read."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.acceptance.conftest import STUCK_SECONDS, Environment, Output, clean_environment, until
from tests.rawhttp import free_port

_MISSING = "there is no embedded database in "
_USED = "store.dsn is not set: using the embedded database in "


@dataclass
class Home:
    """A user without any configuration."""

    directory: Path
    environment: Environment

    async def run(self, *arguments: str, stdin: bytes = b"") -> Output:
        """Run a command to completion."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "keyproxy",
            *arguments,
            env=self.environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(STUCK_SECONDS):
            out, err = await process.communicate(stdin)
        return Output(process.returncode or 0, out.decode(), err.decode())

    @property
    def is_empty(self) -> bool:
        """Whether no database was created, here or in the default directory of the user `nobody`."""
        name = hashlib.sha256(str(self.directory.resolve()).encode()).hexdigest()[:16]
        return not list(self.directory.glob("*")) and not Path("/var/tmp", f"keyproxy-{name}").exists()


@pytest.fixture
async def home() -> AsyncIterator[Home]:
    """A home with a short path, because socket paths have a maximum length."""
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        data = Path(directory, "data")
        data.mkdir(mode=0o755)
        Path(directory).chmod(0o755)
        environment = clean_environment(Path(directory)) | {
            "KEYPROXY_STORE__EMBEDDED_DIR": str(data),
            "KEYPROXY_LISTEN__ADDRESS": f"127.0.0.1:{free_port()}",
            "KEYPROXY_OPS__ADDRESS": f"127.0.0.1:{free_port()}",
            "KEYPROXY_ADMIN__ADDRESS": f"127.0.0.1:{free_port()}",
        }
        yield Home(data, environment)


COMMANDS = (
    ("tenant", "list"),
    ("user", "create", "u", "--tenant", "acme"),
    ("key", "report-leaked"),
    ("key", "whose", "x"),
    ("key", "explain", "key_x", "--path", "/"),
    ("key", "remind", "--dry-run"),
    ("key", "import", "-"),
    ("plan", "list"),
    ("usage", "show"),
    ("audit", "list"),
    ("admin",),
    ("admin", "token", "list"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
async def test_a_command_that_only_looks_creates_no_database(home: Home, command: tuple[str, ...]) -> None:
    stdin = b"digest,user\n" + b"0" * 64 + b",u\n" if "import" in command else b"kp_live_x"
    output = await home.run(*command, stdin=stdin)
    assert (output.status, output.out) == (1, "")
    (line,) = output.err.splitlines()
    assert f"{_MISSING}{home.directory}: pass --config FILE" in line
    assert "keyproxy migrate" in line
    assert home.is_empty


async def test_a_command_that_needs_no_database_neither_creates_nor_mentions_one(home: Home) -> None:
    for command in (("completion", "bash"), ("config", "show"), ("config", "check"), ("--help",)):
        output = await home.run(*command)
        assert (output.status, output.err) == (0, "")
    status = await home.run("migrate", "--status", "--json")
    assert (status.status, status.json["applied"]) == (0, [])
    assert status.json["pending"]
    assert _MISSING in status.err
    assert home.is_empty


async def test_migrate_creates_it_and_every_command_notes_that_it_is_used(home: Home) -> None:
    made = await home.run("migrate", "--json")
    assert made.json["done"]
    assert not home.is_empty
    outputs = [made, await home.run("tenant", "create", "acme", "--json"), await home.run("admin", "token", "list")]
    outputs.append(await home.run("config", "check"))
    for output in outputs:
        assert output.status == 0
        assert output.err == f"keyproxy: {_USED}{home.directory}\n"
    user = (await home.run("user", "create", "u_1", "--tenant", "acme", "--json")).json
    leaked = await home.run("key", "report-leaked", "--json", stdin=f"KEY={user['key']['secret']}".encode())
    assert (leaked.status, [one["user"] for one in leaked.json["found"]]) == (0, ["u_1"])
    config = home.directory.parent / "keyproxy.toml"
    config.write_text(f'[store]\ndsn = "embedded"\nembedded_dir = {json.dumps(str(home.directory))}\n')
    chosen = await home.run("tenant", "list", "--json", "--config", str(config))
    assert ([one["id"] for one in chosen.json], chosen.err) == (["acme"], "")


async def test_serve_creates_it_and_notes_it_once_for_all_workers(home: Home) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "keyproxy",
        "serve",
        env=home.environment | {"KEYPROXY_LISTEN__WORKERS": "2"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        stdin=asyncio.subprocess.DEVNULL,
    )
    assert process.stderr is not None
    printed = b""
    try:
        async with asyncio.timeout(STUCK_SECONDS):
            while b"proxy on" not in printed:
                printed += await process.stderr.readline()
        listed = await home.run("tenant", "list", "--json")
        assert (listed.status, listed.json) == (0, [])
    finally:
        process.terminate()
        printed += (await process.communicate())[1]
    assert printed.decode().count(_USED) == 1

    async def is_over() -> bool:
        return not (home.directory / "pgdata" / "postmaster.pid").exists()

    await until(is_over)
