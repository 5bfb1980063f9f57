"""`keyproxy demo`: its steps, what it leaves behind, and that the commands it suggests work."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from keyproxy.demo import story
from tests.acceptance.conftest import Output, clean_environment, until

SECRET = re.compile(r"kp_(?:live|test)_[0-9A-Za-z]{20,}")

#: Every step, by its title, and the expected output, in order.
STEPS = {
    "A worker calls with alice's key": ["< 200", "User u_alice, Tenant acme, Scope jobs:read jobs:write, Test false"],
    "No key": ["< 401 api_key_missing"],
    "A mistyped key": ["< 401 api_key_invalid"],
    "A well-formed key that does not exist": ["< 401 api_key_invalid"],
    "bob's key can read jobs but not write them": ["< 403 insufficient_scope", "'jobs:write'"],
    "alice's test key": ["< 200", "User u_alice", "Test true"],
    "A worker claims to be another user": ["X-Keyproxy-User: u_root", "< 200", "User u_alice, Tenant acme"],
    "A key is revoked while calls run": ["'200'", "'api_key_revoked'"],
    "carol may spend": ["200 from proxy 1", "200 from proxy 2", "token_budget_exhausted", "tokens"],
    "dave's agent runs away": ["capped at 4096 tokens", "429 token_budget_exhausted (spent)", "x-should-retry: false"],
    "alice's key may not use the model big": ["< 403 model_not_allowed", "'model:premium'"],
    "An admin gives the key the role premium": ["< 200 the compute server received Model big"],
    "alice requests a collection of another tenant": ["/globex/docs", "< 403 namespace_forbidden"],
    "A worker acts for alice and for bob with one service key": [
        "User u_alice, Tenant acme, Scope jobs:write agents:mint, Test false, Actor u_worker",
        "User u_bob",
    ],
    "The worker gives an agent of alice a token for 147 tokens": [
        "< agt_",
        "3 x 200, 429 token_budget_exhausted (spent, token.tokens_total), x-should-retry: false",
    ],
    "The worker's key is revoked, and the agent's token dies with it": ["< 401 api_key_revoked"],
    "erin's key calls a tool that reads: no approval is needed": ["< 200 the MCP server executed search"],
    "The same key may not call a partner": ["< 403 tool_not_allowed, missing: credential"],
    "erin's agent changes a contact, once erin has consented": [
        "< 403 approval_required, apr_",
        "$ keyproxy consent grant --user u_erin --tool crm.update",
        "< 200 the MCP server executed crm.update",
    ],
    "The agent calls a partner: a person approves this call, and no other": [
        "< 403 approval_required, apr_",
        "$ keyproxy approval approve apr_",
        "< 200 the MCP server executed call_partner, approved by apr_",
    ],
    "The agent runs code: an operator approves, and the audit log has every step": [
        "< 200 the MCP server executed run_shell, approved by apr_",
        "< in the audit log: pending, approved, used",
    ],
}


#: The steps of `--oauth`.
OAUTH_STEPS = {
    "An MCP client that knows only the URL finds out where its user signs in": [
        '< 401 WWW-Authenticate: Bearer resource_metadata="http://127.0.0.1:',
        '/.well-known/oauth-protected-resource/mcp", scope="data:read data:write"',
    ],
    "The client registers; nothing is stored for it": ["< 201 kpc1_"],
    "frank signs in with a key and allows the client what it asks for": [
        "frank's browser: /oauth/authorize, /oauth/login, /callback",
        "< a token for 900 seconds with the scopes data:read data:write",
        " of u_frank, client Demo client",
    ],
    "The client calls a tool for frank, then refreshes its token": [
        "< 200 the MCP server executed search for u_frank",
        "< 200 the MCP server executed search for u_frank, with the new token",
    ],
    "An operator ends the session, and its tokens with it": [
        "$ keyproxy oauth session revoke ses_",
        "< 401 api_key_invalid, at most ",
        "400 invalid_grant",
    ],
}


class Stage:
    """The environment of a demo: its data directory, and everything else that it might touch."""

    def __init__(self, root: Path) -> None:
        self.data = root / "data"
        self.surroundings = {name: root / name for name in ("home", "tmp", "cwd")}
        for path in self.surroundings.values():
            path.mkdir()
        self.environment = clean_environment(self.surroundings["home"]) | {"TMPDIR": str(root / "tmp")}

    @contextlib.asynccontextmanager
    async def playing(self, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """A demo in its own session, as a terminal starts it. It ends with the context."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "keyproxy",
            "demo",
            "--directory",
            str(self.data),
            *arguments,
            env=self.environment,
            cwd=self.surroundings["cwd"],
            start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(60):
                yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def once(self, *arguments: str) -> Output:
        """A demo that runs its steps once."""
        async with self.playing("--once", *arguments) as process:
            out, err = await process.communicate()
            return Output(process.returncode or 0, out.decode(), err.decode())

    def processes(self) -> list[str]:
        """The command lines of the processes that name the data directory or have it as working directory."""
        found = []
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if str(self.data) in line or (process / "cwd").readlink().is_relative_to(self.data):
                    found.append(line)
        return found

    async def is_left_alone(self) -> None:
        """Every started process has ended, and only the data directory was written to."""
        await until(self._is_quiet, seconds=20)
        left = {name: [*path.iterdir()] for name, path in self.surroundings.items()}
        assert not any(left.values()), left
        assert not list((self.data / "run").iterdir())

    async def _is_quiet(self) -> bool:
        return not self.processes()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """Uses a short path: socket paths have a maximum length."""
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        yield Stage(Path(directory))


@pytest.fixture(scope="module")
def played(stage: Stage) -> Output:
    """The first run on a machine."""
    return asyncio.run(stage.once())


def test_it_succeeds_without_warnings(played: Output) -> None:
    assert (played.status, played.err) == (0, "")
    assert f"All {len(STEPS)} steps passed." in played.out
    assert "FAILED" not in played.out


def test_the_steps_are_printed_in_order(played: Output) -> None:
    _, *result = re.split(r"(?m)^\d+\. ", played.out)
    assert len(result) == len(STEPS)
    for text, (title, parts) in zip(result, STEPS.items(), strict=True):
        assert text.startswith(title)
        for part in parts:
            assert part in text
        assert "\n   ok\n" in text


def test_no_identity_header_of_a_worker_reaches_the_upstream(played: Output) -> None:
    (claimed,) = re.findall(r"claims to be another user\n(.*)\n(.*)\n", played.out)
    assert "u_root" in claimed[0]
    assert "evil" in claimed[0]
    assert "u_root" not in claimed[1]
    assert "evil" not in claimed[1]


def test_the_delay_of_a_revocation_is_measured_and_within_a_second(played: Output) -> None:
    (delay,) = re.findall(r"accepted call was sent at most (\d+\.\d) ms after the commit", played.out)
    assert float(delay) <= 1000.0


def test_the_delay_of_a_new_role_is_measured_and_within_a_second(played: Output) -> None:
    (delay,) = re.findall(r"received Model big, at most (\d+\.\d) ms after the commit", played.out)
    assert float(delay) <= 1000.0


def test_the_delay_until_an_agent_token_dies_is_measured_and_within_a_second(played: Output) -> None:
    (delay,) = re.findall(r"< 401 api_key_revoked, at most (\d+\.\d) ms after the commit", played.out)
    assert float(delay) <= 1000.0


def test_an_approved_call_is_executed_once_and_then_waits_for_another_approval(played: Output) -> None:
    for tool in ("call_partner", "run_shell"):
        step = played.out.partition(f"> POST /mcp   {tool}\n   < 403 approval_required")[2].partition("\n   ok")[0]
        first, used, second = re.findall(r"apr_\w{22}(?= is pending|\n   < 403)", step)
        assert (first == used, first == second) == (True, False)


def test_the_output_names_the_commands_for_calls_metrics_and_health(played: Output) -> None:
    assert re.search(
        r"(?m)^ +curl -i http://127\.0\.0\.1:\d+/v1/ai/jobs -H 'Authorization: Api-Key kp_live_", played.out
    )
    for path in ("/metrics", "/readyz"):
        assert re.search(rf"(?m)^ +curl http://127\.0\.0\.1:\d+{path}$", played.out)
    assert "Ctrl-C" not in played.out


def test_one_secret_is_shown_once_and_none_is_stored(stage: Stage, played: Output) -> None:
    (shown,) = SECRET.findall(played.out)
    kept = [path for path in stage.data.rglob("*") if path.is_file()]
    assert {"access.log", "demo.toml", "server.log"} <= {path.name for path in kept}
    for path in kept:
        content = path.read_bytes()
        assert shown.encode() not in content, path
        assert path.is_relative_to(stage.data / "pgdata") or not SECRET.search(content.decode()), path


async def test_it_leaves_no_process_and_only_its_data_directory(stage: Stage, played: Output) -> None:
    assert played.status == 0
    await stage.is_left_alone()
    assert stage.data.stat().st_mode & 0o777 == 0o700


async def test_a_second_run_coexists_with_other_proxies_and_stops_with_ctrl_c(stage: Stage, played: Output) -> None:
    assert played.status == 0
    with contextlib.ExitStack() as taken:
        for port in (8080, 9090):
            # Like a proxy that serves here: with a shared port its callers would reach the demo.
            with contextlib.suppress(OSError):
                taken.enter_context(socket.create_server(("127.0.0.1", port), reuse_port=True))
        async with stage.playing() as process:
            result = await _printed_until(process, "Press Ctrl-C to stop.")
            assert "FAILED" not in result
            assert not re.search(r":(8080|9090)\b", result)
            assert SECRET.findall(result) != SECRET.findall(played.out)
            await _try_the_printed_commands(stage, result)
            # To the whole process group, as a terminal does.
            os.killpg(process.pid, signal.SIGINT)
            out, err = await process.communicate()
            assert (process.returncode, err) == (0, b"")
            assert out.decode().strip() == "Bye."
    await stage.is_left_alone()


async def test_mcp_client_connects_a_user_until_an_operator_ends_the_session(stage: Stage, played: Output) -> None:
    assert played.status == 0
    result = await stage.once("--oauth")
    assert (result.status, result.err) == (0, "")
    _, *steps = re.split(r"(?m)^\d+\. ", result.out)
    assert len(steps) == len(OAUTH_STEPS)
    for text, (title, parts) in zip(steps, OAUTH_STEPS.items(), strict=True):
        assert text.startswith(title)
        assert [part for part in parts if part not in text] == []
        assert "\n   ok\n" in text
    assert len(SECRET.findall(result.out)) == 1
    await stage.is_left_alone()


async def _printed_until(process: asyncio.subprocess.Process, end: str) -> str:
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or end not in lines[-1]:
        lines.append((await process.stdout.readline()).decode())
        assert lines[-1], "".join(lines)
    return "".join(lines)


async def _try_the_printed_commands(stage: Stage, result: str) -> None:
    lines = [shlex.split(line) for line in result.splitlines() if line.startswith("  curl ")]
    call, *pages = lines
    header, job = call[call.index("-H") + 1], call[call.index("-d") + 1]
    name, _, value = header.partition(": ")
    url = call[2]
    async with aiohttp.ClientSession() as session:
        content = {name: value, "Content-Type": "application/json"}
        async with session.post(url, data=job, headers=content) as response:
            answer = await response.json()
            assert (response.status, answer["job_id"]) == (200, "7")
            assert answer["identity"]["X-Keyproxy-User"] == ["u_alice"]
        async with session.post(url, data=job, headers={"Content-Type": "application/json"}) as response:
            assert response.status == 401
        for _, page in pages:
            async with session.get(page) as response:
                assert response.status == 200
    await _run_as_printed(stage, result)


async def _run_as_printed(stage: Stage, result: str) -> None:
    """Run every suggested command in a shell in another directory."""
    invitation = result.partition("Try it yourself:")[2]
    commands = [line.strip() for line in invitation.splitlines() if line.startswith("  ")]
    assert len(commands) == 5
    answers = []
    for command in commands:
        if command.startswith("curl ") and shutil.which("curl") is None:
            continue
        running = await asyncio.create_subprocess_exec(
            "sh",
            "-c",
            command,
            env=stage.environment,
            cwd="/",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await running.communicate()
        assert running.returncode == 0, (command, err)
        answers.append(out)
    assert answers[-1].count(b"u_alice") == 3
    if len(answers) == len(commands):
        assert answers[0].startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("is_on_path", [True, False])
def test_commands_name_the_program_as_a_shell_elsewhere_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_on_path: bool
) -> None:
    (tmp_path / "a b").mkdir()
    script = tmp_path / "a b" / "keyproxy"
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin" if is_on_path else "/usr/bin:/bin")
    monkeypatch.setattr(sys, "argv", ["a b/keyproxy", "demo"])
    assert story.own_command() == ("keyproxy" if is_on_path else f"'{script}'")
    monkeypatch.setattr(sys, "argv", ["/somewhere/keyproxy/__main__.py", "demo"])
    assert story.own_command() == f"{sys.executable} -m keyproxy"


async def test_ctrl_c_during_startup_ends_the_demo(stage: Stage, played: Output) -> None:
    assert played.status == 0
    async with stage.playing() as process:
        await _printed_until(process, "Starting PostgreSQL")
        os.killpg(process.pid, signal.SIGINT)
        _, err = await process.communicate()
        assert b"Traceback" not in err
    await stage.is_left_alone()
