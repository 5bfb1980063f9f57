"""keyproxy as users run it: processes, a configuration file, signals, a PostgreSQL by DSN."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from keyproxy.auth.api_key import KeyFormat
from keyproxy.store.directory.directory import Actor, Directory, KeyWish
from keyproxy.store.postgres import migrations, scratch_databases
from keyproxy.store.postgres.database import Database
from tests import waiting
from tests.acceptance.command_server import CommandServer
from tests.rawhttp import Client, Upstream, connect, free_port
from tests.running_process import RunningProcess
from tests.server import Server

ROOT = Path(__file__).parents[2]

Environment = dict[str, str]

#: Anything that takes longer is stuck. This is no promise of speed: on a busy machine a process may need half a minute to
#: start. Tests of a promised time name that time instead.
STUCK_SECONDS = 120.0

#: Sets the limit of open files to the first argument, then executes the rest of the command line.
_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


def clean_environment(home: Path) -> Environment:
    """An environment without any keyproxy configuration."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KEYPROXY_", "XDG_"))}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)}


@dataclass
class Output:
    """A command's output and exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as JSON."""
        return json.loads(self.out)


@dataclass
class Site:
    """One configuration, and every process that runs with it."""

    config: Path
    environment: Environment
    proxy_port: int
    ops_port: int
    upstream: Upstream
    dsn: str
    commands: CommandServer | None
    printed: list[bytes] = field(default_factory=list)

    async def run(self, *arguments: str, stdin: bytes | None = None) -> Output:
        """Run a command to completion: as users do, unless there is a server of commands."""
        if self.commands is not None:
            command = [*arguments, "--config", str(self.config)]
            status, out, err = await asyncio.to_thread(
                self.commands.run, command, self.environment, stdin, seconds=STUCK_SECONDS
            )
            self.printed += [err]
            return Output(status, out.decode(), err.decode())
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "keyproxy",
            *arguments,
            "--config",
            str(self.config),
            env=self.environment,
            stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(STUCK_SECONDS):
            out, err = await process.communicate(stdin)
        self.printed += [err]
        return Output(process.returncode or 0, out.decode(), err.decode())

    async def run_json(self, *arguments: str) -> Any:
        """Run a command that must succeed; returns its JSON."""
        output = await self.run(*arguments, "--json")
        assert output.status == 0, output.err
        return output.json

    async def key(
        self, user: str = "u_42", *, scopes: Sequence[str] = (), is_test: bool = False, tenant: str = "acme"
    ) -> dict[str, Any]:
        """A key of a user; creates the user if missing. Created as the commands do it, without a subprocess."""
        database = Database(self.dsn, pool_size_max=1, statement_timeout_seconds=5.0)
        await database.open()
        try:
            directory = Directory(database, KeyFormat(), Actor("test", "local"))
            await directory.tenants.create(tenant, "")
            await directory.users.create(user, tenant, None)
            return await directory.keys.issue(user, KeyWish(scopes=scopes, is_test=is_test))
        finally:
            await database.close()

    def client(self) -> contextlib.AbstractAsyncContextManager[Client]:
        """A connection to the proxied port."""
        return connect(("127.0.0.1", self.proxy_port))

    async def call(self, secret: str, method: str = "POST", path: str = "/v1/ai/jobs") -> tuple[int, str]:
        """(status, code) of one call; the code is empty if the upstream responded."""
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{self.proxy_port}{path}"
            headers = {"Authorization": f"Api-Key {secret}"}
            async with session.request(method, url, headers=headers, data=b"{}") as response:
                content = await response.json(content_type=None)
                return response.status, content.get("code", "")

    async def ops(self, path: str) -> tuple[int, str]:
        """(status, body) of a page of the ops listener."""
        url = f"http://127.0.0.1:{self.ops_port}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, await response.text()

    async def metric(self, name: str, **labels: str) -> float:
        """The value of one series, 0.0 if it is missing."""
        _, page = await self.ops("/metrics")
        for line in page.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(
                f'{label}="{text}"' in series for label, text in labels.items()
            ):
                return float(value)
        return 0.0

    @contextlib.asynccontextmanager
    async def serving(self, *, files_max: int = 0) -> AsyncIterator[RunningProcess]:
        """`keyproxy serve`, until the context or the process ends. `files_max`: its limit of open files."""
        (out, out_kept), (err, err_kept) = await self._pipe(), await self._pipe()
        process = await self.start("serve", out=out, err=err, files_max=files_max)
        os.close(out)
        os.close(err)
        try:
            await until(self._is_up, while_running=process)
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(STUCK_SECONDS):
                await process.wait()
            await asyncio.gather(out_kept, err_kept)

    async def start(self, command: str, *, out: int, err: int, files_max: int = 0) -> RunningProcess:
        """Start a command: as users do, unless there is a server of commands. `out`, `err`: its descriptors."""
        arguments = [command, "--config", str(self.config)]
        if self.commands is not None and not files_max:
            return await self.commands.start(arguments, self.environment, out=out, err=err, seconds=STUCK_SECONDS)
        limited = [sys.executable, "-c", _LIMITED, str(files_max)] if files_max else []
        return await asyncio.create_subprocess_exec(
            *limited, sys.executable, "-m", "keyproxy", *arguments, env=self.environment, stdout=out, stderr=err
        )

    async def _pipe(self) -> tuple[int, asyncio.Task[None]]:
        """The end to which a process writes, and the task that keeps what it has printed."""
        reading, writing = os.pipe()
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb")
        )

        async def keep() -> None:
            with contextlib.closing(transport):
                while chunk := await stream.read(65_536):
                    self.printed.append(chunk)

        return writing, asyncio.create_task(keep())

    def log(self) -> list[dict[str, Any]]:
        """The access log so far."""
        lines = b"".join(self.printed).splitlines()
        return [json.loads(line) for line in lines if line.startswith(b'{"time"')]

    async def until_ready(self, process: RunningProcess) -> None:
        """Wait until the proxy that this process runs is ready."""

        async def is_ready() -> bool:
            with contextlib.suppress(OSError):
                return (await self.ops("/readyz"))[0] == 200
            return False

        await until(is_ready, while_running=process)

    async def until_logged(self, text: str, *, times: int = 1) -> None:
        """Wait until the processes of this site have logged the text, at least `times` times."""
        await until(lambda: b"".join(self.printed).count(text.encode()) >= times, f"{text!r} is logged")

    async def _is_up(self) -> bool:
        # Cheap, because the process that is waited for needs the CPU.
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.ops_port)):
                return False
        try:
            return (await self.ops("/livez"))[0] == 200
        except aiohttp.ClientError:
            return False


#: Most conditions are requests to the processes that are waited for, which need the CPU themselves.
until = functools.partial(waiting.until, seconds=STUCK_SECONDS, pause_seconds=0.02)


@contextlib.asynccontextmanager
async def administering(site: Site, port: int) -> AsyncIterator[RunningProcess]:
    """`keyproxy admin` on a port, while the context lasts."""
    with Path(os.devnull).open("wb") as nowhere:
        process = await site.start("admin", out=nowhere.fileno(), err=nowhere.fileno())

    async def is_up() -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/livez") as answer:
                return answer.status == 200
        return False

    try:
        await until(is_up, while_running=process)
        yield process
    finally:
        process.terminate()
        await process.wait()


Configure = Callable[..., Site]


@pytest.fixture(scope="session")
def commands() -> Iterator[CommandServer]:
    """Runs the commands of all sites."""
    with contextlib.closing(CommandServer(ROOT)) as server:
        yield server


@pytest.fixture
async def configure(tmp_path: Path, commands: CommandServer | None) -> AsyncIterator[Configure]:
    """Make a site: `configure(dsn, cache={...}, routes=[...], tools=[...])`. Lists are arrays of tables."""
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(Upstream().serving())

        def configuring(dsn: str, **tables: dict[str, Any] | list[dict[str, Any]] | None) -> Site:
            proxy_port, ops_port = free_port(), free_port()
            content: dict[str, dict[str, Any]] = {
                "listen": {"address": f"127.0.0.1:{proxy_port}"},
                "ops": {"address": f"127.0.0.1:{ops_port}"},
                "upstream": {"url": f"http://127.0.0.1:{upstream.port}"},
                "store": {"dsn": dsn},
            }
            arrays = {table: rows for table, rows in tables.items() if isinstance(rows, list)}
            for table, values in tables.items():
                if isinstance(values, dict):
                    content.setdefault(table, {}).update(values)
            lines = []
            for table, values in content.items():
                lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
            for table, rows in arrays.items():
                for row in rows:
                    lines += [f"[[{table}]]", *(f"{key} = {json.dumps(value)}" for key, value in row.items())]
            config = tmp_path / "keyproxy.toml"
            config.write_text("\n".join(lines) + "\n", encoding="utf-8")
            return Site(config, clean_environment(tmp_path), proxy_port, ops_port, upstream, dsn, commands)

        yield configuring


@pytest.fixture
def site(configure: Configure, dsn: str) -> Site:
    """A site over this test's database, with the usual settings."""
    return configure(dsn)


@pytest.fixture(scope="session")
def deployment(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Both processes, for all tests of clients."""
    # It starts processes with the environment of this module.
    from tests.acceptance.oauth_deployment import deployed

    name = f"kp_test_oauth_{secrets.token_hex(4)}"
    asyncio.run(scratch_databases.create(postgres.dsn("postgres"), name))
    asyncio.run(migrations.migrate(postgres.dsn(name)))
    try:
        with deployed(postgres.dsn(name), tmp_path_factory.mktemp("oauth")) as deployment:
            yield deployment
    finally:
        asyncio.run(scratch_databases.drop(postgres.dsn("postgres"), name))
