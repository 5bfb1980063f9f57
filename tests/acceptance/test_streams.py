"""Closed, full or abandoned standard streams: nothing aborts, and every lost secret is reported."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import STUCK_SECONDS, Configure, Output, Site, until

CLOSED = ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"]
FULL = Path("/dev/full")

needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


async def shell(site: Site, arguments: str, redirections: str) -> Output:
    """Run a command as a shell does, with these redirections."""
    line = f'exec "$0" -m keyproxy {arguments} --config "$1" {redirections}'
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        line,
        sys.executable,
        str(site.config),
        env=site.environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(STUCK_SECONDS):
        out, err = await process.communicate()
    assert b"Traceback" not in err, err
    return Output(process.returncode or 0, out.decode(), err.decode())


# -- closed


@pytest.mark.parametrize("redirections", CLOSED)
async def test_commands_run_without_some_of_their_streams(site: Site, redirections: str) -> None:
    for command in ("config check", "tenant create acme", "tenant list", "key list", "audit list", "migrate --status"):
        output = await shell(site, command, redirections)
        assert output.status == 0, (command, output.err)
    assert [tenant["id"] for tenant in await site.run_json("tenant", "list")] == ["acme"]


@pytest.mark.parametrize(("redirections", "workers"), [*((one, 1) for one in CLOSED), (CLOSED[-1], 2)])
async def test_a_proxy_serves_without_some_of_its_streams(
    configure: Configure, dsn: str, redirections: str, workers: int
) -> None:
    site = configure(dsn, listen={"workers": workers})
    secret = (await site.key())["secret"]
    line = f'exec "$0" -m keyproxy serve --config "$1" {redirections}'
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        line,
        sys.executable,
        str(site.config),
        env=site.environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await site.until_ready(process)
        for _ in range(4):
            assert await site.call(secret) == (200, "")
        for fd in range(3):
            # No socket of the proxy has the descriptor of a standard stream.
            assert Path(f"/proc/{process.pid}/fd/{fd}").readlink() == Path(os.devnull)
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), STUCK_SECONDS) == 0


async def test_no_secret_is_created_without_a_stdout_to_show_it(site: Site, tmp_path: Path) -> None:
    key = await site.key()
    table = tmp_path / "users.csv"
    table.write_text("user,name\nu_42,nightly\n", encoding="utf-8")
    for command in (
        "key issue --user u_42",
        f"key rotate {key['id']}",
        f"key issue-many {table}",
        "user create u_7 --tenant acme",
        "admin token create --scope admin:write",
    ):
        output = await shell(site, command, ">&-")
        assert (output.status, output.err) == (
            1,
            "keyproxy: stdout is closed, so the secret cannot be shown: nothing was changed\n",
        ), command
    assert [one["id"] for one in await site.run_json("key", "list")] == [key["id"]]
    assert await site.run_json("admin", "token", "list") == []
    assert [user["id"] for user in await site.run_json("user", "list")] == ["u_42"]
    assert (await shell(site, "user create u_7 --tenant acme --no-key", ">&-")).status == 0


# -- full


@needs_full
@pytest.mark.parametrize("options", ["", " --json"])
async def test_a_lost_secret_is_reported_with_its_key_and_the_remedy(site: Site, options: str) -> None:
    key = await site.key()
    output = await shell(site, f"key issue --user u_42{options}", "> /dev/full")
    (lost,) = [one for one in await site.run_json("key", "list") if one["id"] != key["id"]]
    result = (
        "keyproxy: stdout cannot be written (No space left on device): the secret of key {} is lost: `keyproxy key {}`"
    )
    assert output.status == 1
    assert output.err.startswith(result.format(lost["id"], f"revoke {lost['id']}"))
    await site.run_json("key", "revoke", lost["id"])

    output = await shell(site, f"key rotate {key['id']}{options}", "> /dev/full")
    successor = (await site.run_json("key", "show", key["id"]))["replaced_by"]
    assert output.status == 1
    assert output.err.startswith(result.format(successor, f"revoke {successor}"))
    assert f"then rotate {key['id']} again" in output.err
    await site.run_json("key", "revoke", successor)
    assert (await site.run_json("key", "rotate", key["id"]))["secret"].startswith("kp_live_")

    output = await shell(site, f"user create u_7 --tenant acme{options}", "> /dev/full")
    (first,) = await site.run_json("key", "list", "--user", "u_7")
    assert output.status == 1
    assert f"user u_7 was created, and the secret of key {first['id']} is lost" in output.err
    assert f"`keyproxy key revoke {first['id']}`, then `keyproxy key issue --user u_7`" in output.err

    output = await shell(site, f"admin token create --scope admin:write{options}", "> /dev/full")
    (token,) = await site.run_json("admin", "token", "list")
    assert output.status == 1
    assert f"`keyproxy admin token revoke {token['id']}`" in output.err


async def test_a_secret_for_a_reader_that_has_left_is_named_too(site: Site) -> None:
    await site.run_json("tenant", "create", "acme")
    reading, writing = os.pipe()
    os.close(reading)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "keyproxy",
        "user",
        "create",
        "u_7",
        "--tenant",
        "acme",
        "--config",
        str(site.config),
        env=site.environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=writing,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(writing)
    _, err = await asyncio.wait_for(process.communicate(), STUCK_SECONDS)
    (key,) = await site.run_json("key", "list", "--user", "u_7")
    assert process.returncode == 1
    assert (
        f"stdout cannot be written (Broken pipe): user u_7 was created, and the secret of key {key['id']}"
        in err.decode()
    )


@needs_full
async def test_other_output_that_cannot_be_printed_is_a_failure_in_one_line(site: Site) -> None:
    await site.key()
    for command in ("tenant list", "key list --json", "config show", "audit export", "usage show --help"):
        output = await shell(site, command, "> /dev/full")
        assert output.status == 1, command
        assert output.err == "keyproxy: the output cannot be used: No space left on device\n", command
    assert (await shell(site, "tenant list --json", "2> /dev/full")).json[0]["id"] == "acme"
    assert (await shell(site, "tenant show nothing", "2> /dev/full")).status == 1


@needs_full
async def test_secrets_lost_on_a_full_disk_are_issued_again_and_used_keys_stay(site: Site, tmp_path: Path) -> None:
    for number in range(3):
        await site.key(f"u_{number}")
    table = tmp_path / "users.csv"
    table.write_text("user,name\n" + "".join(f"u_{number},nightly\n" for number in range(3)), encoding="utf-8")
    command = f"key issue-many {table} --scope jobs:write --json"
    lost = await shell(site, command, "> /dev/full")
    assert lost.status == 1
    assert "--reissue-unseen" in lost.err
    before = {one["user"]: one for one in await site.run_json("key", "list") if one["name"] == "nightly"}
    assert len(before) == 3
    plain = await shell(site, command, "")
    assert [json.loads(line)["created"] for line in plain.out.splitlines()] == [False] * 3

    again = await shell(site, f"{command} --reissue-unseen", "")
    keys = [json.loads(line) for line in again.out.splitlines()]
    assert [(key["created"], key["reissues"]) for key in keys] == [
        (True, before[f"u_{number}"]["id"]) for number in range(3)
    ]
    for one in before.values():
        shown = await site.run_json("key", "show", one["id"])
        assert (shown["state"], shown["revoke_reason"]) == (
            "revoked",
            "issued again: its secret was lost before it was used",
        )
    revoked = [
        row for row in await site.run_json("audit", "list") if row["action"] == "update" and row["entity"] == "key"
    ]
    assert {row["entity_id"] for row in revoked} == {one["id"] for one in before.values()}
    async with site.serving():
        assert await site.call(keys[0]["secret"]) == (200, "")
        assert await site.call(keys[1]["secret"]) == (200, "")
    # The proxy has exited and recorded the use of two keys.
    third = await shell(site, f"{command} --reissue-unseen", "")
    assert [json.loads(line)["created"] for line in third.out.splitlines()] == [False, False, True]


@needs_full
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_full_stdout_loses_only_log_lines(configure: Configure, dsn: str, workers: int) -> None:
    site = configure(dsn, listen={"workers": workers})
    secret = (await site.key())["secret"]
    with FULL.open("wb") as full:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "keyproxy",
            "serve",
            "--config",
            str(site.config),
            env=site.environment,
            stdout=full,
            stderr=asyncio.subprocess.PIPE,
        )
    assert process.stderr is not None
    try:
        await site.until_ready(process)
        for _ in range(3):
            for _ in range(5):
                assert await site.call(secret) == (200, "")
            await asyncio.sleep(0.6)

        async def are_counted() -> bool:
            return await site.metric("keyproxy_access_log_dropped_total") == 15

        await until(are_counted)
    finally:
        process.send_signal(signal.SIGTERM)
        err = (await asyncio.wait_for(process.communicate(), STUCK_SECONDS))[1].decode()
    assert process.returncode == 0
    # Logged once per outage, not once per line.
    assert 1 <= err.count("cannot write the access log: [Errno 28] No space left on device") <= workers


def test_missing_streams_are_opened_in_order_before_anything_else(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from keyproxy.platform import standard_streams as streams\n"
        "streams.open_missing()\n"
        "names = [os.readlink(f'/proc/self/fd/{fd}') for fd in range(3)]\n"
        "open(sys.argv[1], 'w').write(repr((names, sys.stdin.read(), streams.is_stdout_missing())))\n"
        "print('out'); print('err', file=sys.stderr)\n"
    )
    result = tmp_path / "result"
    line = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", line, sys.executable, program, str(result)], check=False)
    assert done.returncode == 0
    names, read, is_missing = _literal(result.read_text(encoding="utf-8"))
    assert (names, read, is_missing) == ([os.devnull] * 3, "", True)


def _literal(text: str) -> Any:
    import ast

    return ast.literal_eval(text)
