"""Graceful shutdown: lingering, draining by signal and by command, and the results of health checks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from keyproxy.platform import process_registry
from tests.acceptance.conftest import STUCK_SECONDS, Configure, Output, Site, administering, until
from tests.acceptance.test_alive import workers_of
from tests.rawhttp import connect, free_port
from tests.running_process import RunningProcess
from tests.wire.conftest import request

LINGER_SECONDS = 3.0

BOTH = pytest.mark.parametrize("workers", [1, 2])


class Visitors:
    """Requests on new connections, as a load balancer sends them until it notices the shutdown."""

    def __init__(self, site: Site, secret: str) -> None:
        self.served = 0
        self.refused = 0
        self.wrong: list[str] = []
        self._site = site
        self._request = request("GET", "/", key=secret.encode())

    @contextlib.asynccontextmanager
    async def coming(self) -> AsyncIterator[None]:
        over = asyncio.Event()
        task = asyncio.create_task(self._come(over))
        try:
            yield
        finally:
            over.set()
            await task

    async def _come(self, over: asyncio.Event) -> None:
        while not over.is_set():
            try:
                async with connect(("127.0.0.1", self._site.proxy_port)) as client:
                    await client.send(self._request)
                    answer = await client.answer(seconds=STUCK_SECONDS)
            except OSError:
                self.refused += 1
            else:
                self.served += answer.status == 200
                if answer.status != 200 or answer.one("Connection") != "close":
                    self.wrong.append(f"{answer.start} {answer.one('Connection')}")
            await asyncio.sleep(0.02)


async def leave(site: Site, process: RunningProcess, how: str) -> None:
    """Shut a proxy down in one of the two ways."""
    if how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        result = await site.run("drain", "--json")
        assert (result.status, result.json) == (0, {"pid": process.pid, "draining": True, "drained": False}), result.err


@BOTH
@pytest.mark.parametrize("how", ["SIGTERM", "drain"])
async def test_a_connection_while_lingering_is_served_and_then_closed(
    configure: Configure, dsn: str, workers: int, how: str
) -> None:
    site = configure(dsn, listen={"workers": workers, "linger_seconds": LINGER_SECONDS})
    secret = (await site.key())["secret"]
    async with site.serving() as process, site.client() as kept_alive:
        await kept_alive.send(request("GET", "/", key=secret.encode()))
        assert (await kept_alive.answer()).one("Connection") is None
        await leave(site, process, how)
        left = time.monotonic()

        async def is_unready() -> bool:
            return (await site.ops("/readyz"))[0] == 503

        await until(is_unready, seconds=1.0)
        visitors = Visitors(site, secret)
        async with visitors.coming():
            await asyncio.sleep(0.5)
            await kept_alive.send(request("GET", "/", key=secret.encode()))
            answer = await kept_alive.answer()
            assert (answer.status, answer.one("Connection")) == (200, "close")
            # Until shortly before its end.
            await asyncio.sleep(left + LINGER_SECONDS - 1.0 - time.monotonic())
        assert (await site.ops("/livez"))[0] == 200
        assert (visitors.refused, visitors.wrong) == (0, [])
        assert visitors.served > 10
        assert await asyncio.wait_for(process.wait(), STUCK_SECONDS) == 0
        assert time.monotonic() - left >= LINGER_SECONDS - 1.0
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", site.proxy_port)


@BOTH
async def test_further_sigterms_change_nothing_and_sigint_ends_the_lingering(
    configure: Configure, dsn: str, workers: int
) -> None:
    site = configure(dsn, listen={"workers": workers, "linger_seconds": 600.0})
    async with site.serving() as process:
        for _ in range(3):
            # Like a service manager that signals every process of a group.
            for pid in (process.pid, *workers_of(process.pid)):
                os.kill(pid, signal.SIGTERM)
            await asyncio.sleep(0.2)
        async with site.client():
            pass
        assert process.returncode is None
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_sigint_leaves_without_lingering(configure: Configure, dsn: str) -> None:
    site = configure(dsn, listen={"linger_seconds": 600.0})
    async with site.serving() as process:
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 20) == 0


@BOTH
async def test_drain_waits_for_requests_in_flight(configure: Configure, dsn: str, workers: int) -> None:
    site = configure(dsn, listen={"workers": workers})
    secret = (await site.key())["secret"]
    async with site.serving() as process, site.client() as client:
        await client.send(request("POST", "/", "Content-Length: 2", key=secret.encode()) + b"{")
        waiting = asyncio.create_task(site.run("drain", "--wait", "--json"))
        await site.until_logged("draining")
        done, _ = await asyncio.wait([waiting], timeout=0.5)
        assert not done
        await client.send(b"}")
        assert (await client.answer()).status == 200
        result: Output = await asyncio.wait_for(waiting, STUCK_SECONDS)
        assert (result.status, result.json) == (0, {"pid": process.pid, "draining": True, "drained": True}), result.err
        assert await asyncio.wait_for(process.wait(), 5) == 0


async def test_drain_fails_if_the_proxy_exits_without_draining(site: Site) -> None:
    secret = (await site.key())["secret"]
    async with site.serving() as process, site.client() as client:
        await client.send(request("POST", "/", "Content-Length: 2", key=secret.encode()) + b"{")
        waiting = asyncio.create_task(site.run("drain", "--wait"))
        await site.until_logged("draining")
        await asyncio.sleep(0.3)
        process.kill()
        result = await asyncio.wait_for(waiting, STUCK_SECONDS)
        assert result.status == 1
        assert f"the proxy (pid {process.pid}) exited before it had drained" in result.err


async def test_drain_without_a_proxy_fails_and_names_the_address(site: Site) -> None:
    result = await site.run("drain")
    assert (result.status, result.out) == (1, "")
    assert result.err == f"keyproxy: no proxy of this user runs on 127.0.0.1:{site.proxy_port}\n"


async def test_of_two_that_share_an_address_one_is_chosen_by_its_pid(site: Site) -> None:
    async with site.serving() as old, site.serving() as new:
        await site.until_logged("proxy on")

        async def are_two() -> bool:
            return b"".join(site.printed).count(b"proxy on") == 2

        await until(are_two)
        result = await site.run("drain")
        assert result.status == 1
        assert "2 proxies run on" in result.err
        assert str(old.pid) in result.err
        result = await site.run("drain", "--wait", "--pid", str(old.pid))
        assert result.status == 0, result.err
        assert await asyncio.wait_for(old.wait(), 5) == 0
        assert new.returncode is None
        assert (await site.run("drain", "--wait")).status == 0


# -- health


@BOTH
async def test_health_follows_the_process_and_not_its_readiness(configure: Configure, dsn: str, workers: int) -> None:
    site = configure(dsn, listen={"workers": workers, "linger_seconds": 600.0}, upstream={"url": "http://127.0.0.1:1"})
    assert (await site.run("health")).status == 1
    async with site.serving() as process:
        assert (await site.ops("/readyz"))[0] == 503
        result = await site.run("health")
        line = f"keyproxy: `keyproxy serve` (pid {process.pid}) is live\n"
        assert (result.status, result.out, result.err) == (0, "", line)
        result = await site.run("health", "--json")
        assert result.json == {"live": [{"command": "serve", "pid": process.pid}]}
        process.send_signal(signal.SIGTERM)
        assert (await site.run("health")).status == 0
        process.send_signal(signal.SIGSTOP)
        result = await site.run("health")
        process.send_signal(signal.SIGCONT)
        assert result.status == 1
        assert f"(pid {process.pid}) does not respond" in result.err
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.wait(), STUCK_SECONDS)
    assert (await site.run("health")).status == 1


async def test_health_knows_the_admin_process(configure: Configure, dsn: str) -> None:
    port = free_port()
    site = configure(dsn, admin={"address": f"127.0.0.1:{port}"})
    async with administering(site, port) as process:
        result = await site.run("health", "--json")
        assert result.json == {"live": [{"command": "admin", "pid": process.pid}]}
        assert (await site.run("drain")).status == 1
    assert (await site.run("health")).status == 1


async def test_health_with_a_configuration_that_cannot_be_used_is_misused(site: Site) -> None:
    site.config.write_text("[listen]\nport = 1\n", encoding="utf-8")
    result = await site.run("health")
    assert result.status == 2
    assert "listen.port: no such key" in result.err


def test_health_imports_no_slow_library() -> None:
    import subprocess

    heavy = "asyncio, asyncpg, aiohttp, uvloop, click, pydantic, orjson, prometheus_client, redis, httptools"
    program = (
        "import sys; sys.argv = ['keyproxy', 'health']\n"
        "from keyproxy import __main__\n"
        "try: __main__.main()\n"
        "except SystemExit: pass\n"
        f"print(*set({heavy.split(', ')!r}) & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


# -- access control


#: Connects as another user to each name in its arguments, and prints the responses.
_STRANGER = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
for name in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        try:
            sock.connect("\\0" + name)
            sock.sendall(b"drain\\n" if "/" in name else b"GET /metrics HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")
            print(sock.recv(4096).split(b"\\r\\n")[0].decode())
        except OSError as error:
            print(error)
"""


def unnamed_sockets() -> set[str]:
    """The abstract names that the kernel has chosen."""
    return set(re.findall(r"(?m)@([0-9a-f]{5})$", Path("/proc/net/unix").read_text(encoding="utf-8")))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can switch to another user")
async def test_another_user_can_neither_drain_a_proxy_nor_query_its_workers(configure: Configure, dsn: str) -> None:
    site = configure(dsn, listen={"workers": 2})
    before = unnamed_sockets()
    async with site.serving() as process:
        (control,) = [one.name for one in process_registry.running() if one.pid == process.pid]
        workers = sorted(unnamed_sockets() - before)
        other = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _STRANGER, control, *workers, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(other.communicate(), STUCK_SECONDS)
        drained, *logged = out.decode().splitlines()
        assert process_registry.DRAINING.decode().strip() not in drained
        # Other programs on this machine may have created such a name meanwhile.
        assert logged.count("HTTP/1.1 403 Forbidden") >= 2
        assert "HTTP/1.1 200 OK" not in logged
        assert (await site.ops("/readyz"))[0] == 200
        assert await site.metric("keyproxy_workers", state="ready") == 2
        assert process.returncode is None


def test_a_socket_name_of_another_user_is_not_mistaken_for_a_proxy() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("\0keyproxy/1/serve/not-a-name")
        sock.listen()
        assert not [one for one in process_registry.running() if "not-a-name" in one.name]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can switch to another user")
async def test_another_user_cannot_keep_a_proxy_from_starting_by_a_name(site: Site) -> None:
    other = process_registry.Presence(
        "serve", process_registry.encoded(f"127.0.0.1:{site.proxy_port}"), process_registry.NOWHERE, "0" * 16
    )
    squatting = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.bind('\\0' + sys.argv[1]);"
        " s.listen(); print('up', flush=True); sys.stdin.read()",
        other.name(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert squatting.stdout is not None
    assert await squatting.stdout.readline() == b"up\n"
    async with site.serving() as process:
        result = await site.run("health", "--json")
        assert result.json == {"live": [{"command": "serve", "pid": process.pid}]}
    squatting.kill()
    await squatting.wait()


# -- unix sockets


async def test_unix_sockets_have_their_modes_and_keep_them_until_a_restart(configure: Configure, dsn: str) -> None:
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        listen = {"address": f"unix:{directory}/proxy.sock", "socket_mode": "0660"}
        site = configure(dsn, listen=listen)
        secret = (await site.key())["secret"].encode()
        async with site.serving() as process:
            assert stat.S_IMODE(Path(directory, "proxy.sock").stat().st_mode) == 0o660
            async with connect(f"{directory}/proxy.sock") as client:
                await client.send(request("GET", "/", key=secret))
                assert (await client.answer()).status == 200
            before = site.config.read_text(encoding="utf-8")
            site.config.write_text(before.replace("0660", "0600"), encoding="utf-8")
            process.send_signal(signal.SIGHUP)
            await site.until_logged("reload rejected: socket_mode: applies when the socket is created")
            assert stat.S_IMODE(Path(directory, "proxy.sock").stat().st_mode) == 0o660
            assert (await site.run("drain", "--wait")).status == 0
