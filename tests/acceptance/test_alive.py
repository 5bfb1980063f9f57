"""Workers, reloads and restarts under load."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import trustme

from tests.acceptance.conftest import STUCK_SECONDS, Configure, Site, until
from tests.rawhttp import Client
from tests.running_process import RunningProcess
from tests.store.harness import Sql
from tests.wire.conftest import request

#: Between two requests on a connection. Without a pause, starting processes would lack CPU, and no connection would ever
#: be idle.
_PAUSE_SECONDS = 0.005


@pytest.fixture
def commands() -> None:
    """Each process starts as users start it."""


class Load:
    """Sequential requests on reused connections; collects failures."""

    def __init__(self, site: Site, secret: str) -> None:
        self.answered = 0
        self.wrong: list[str] = []
        self._site = site
        self._request = request("GET", "/", key=secret.encode())

    @contextlib.asynccontextmanager
    async def running(self, connections: int = 8) -> AsyncIterator[None]:
        """While the context lasts."""
        over = asyncio.Event()
        tasks = [asyncio.create_task(self._go_on(over)) for _ in range(connections)]
        try:
            yield
        finally:
            over.set()
            await asyncio.gather(*tasks)

    async def _go_on(self, over: asyncio.Event) -> None:
        while not over.is_set():
            try:
                async with self._site.client() as client:
                    while not over.is_set() and await self._once(client):
                        await asyncio.sleep(_PAUSE_SECONDS)
            except (OSError, AssertionError, TimeoutError) as error:
                self.wrong.append(repr(error))
                await asyncio.sleep(0.05)

    async def _once(self, client: Client) -> bool:
        await client.send(self._request)
        answer = await client.answer(seconds=STUCK_SECONDS)
        if answer.status == 200:
            self.answered += 1
        else:
            self.wrong.append(answer.start)
        return answer.one("Connection") != "close"


async def more(load: Load, number: int = 200) -> None:
    """Wait for a number of further responses."""
    goal = load.answered + number

    async def is_reached() -> bool:
        return load.answered >= goal or bool(load.wrong)

    await until(is_reached)


def workers_of(supervisor: int) -> list[int]:
    """The workers of a supervisor."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text(encoding="ascii").split()
    return [int(one) for one in children if b"--worker-of" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_rolling_restart_fails_no_request(configure: Configure, dsn: str, workers: int) -> None:
    site = configure(dsn, listen={"workers": workers})
    load = Load(site, (await site.key())["secret"])
    async with contextlib.AsyncExitStack() as stack:
        old = await stack.enter_async_context(site.serving())
        async with load.running():
            await more(load)
            for number in (2, 3):
                new = await stack.enter_async_context(site.serving())
                await have_started(site, number, new)
                old.send_signal(signal.SIGTERM)
                assert await asyncio.wait_for(old.wait(), STUCK_SECONDS) == 0
                old = new
                await more(load)
    assert load.wrong == []


async def have_started(site: Site, number: int, latest: RunningProcess) -> None:
    """Wait until the logs of this number of processes, including the latest, report that they serve; for workers the
    supervisor logs it."""

    async def is_so() -> bool:
        return b"".join(site.printed).count(b"ops on 127.0.0.1:") == number

    await until(is_so, while_running=latest)


async def test_a_reload_takes_effect_immediately_and_fails_no_request(configure: Configure, dsn: str) -> None:
    site = configure(dsn)
    load = Load(site, (await site.key())["secret"])
    async with site.serving() as process, load.running():
        await more(load)
        with site.config.open("a", encoding="utf-8") as config:
            config.write('[[routes]]\nmatch = "GET /"\n')
        process.send_signal(signal.SIGHUP)
        await site.until_logged("configuration reloaded")
        assert (await site.call((await site.key())["secret"], "GET", "/other"))[1] == "route_not_allowed"
        await more(load)
    assert load.wrong == []


#: One per open store.
_LISTENERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"


async def test_a_request_from_before_a_reload_is_decided_with_the_old_store_which_then_closes(
    configure: Configure, dsn: str
) -> None:
    site = configure(dsn, routes=[{"match": "* /{rest...}", "tokens": "openai"}])
    secret = (await site.key())["secret"]
    sql: Sql = await asyncpg.connect(dsn)
    await sql.execute("""INSERT INTO keyproxy.plans VALUES ('p', '{"requests_per_day": 9, "tokens_per_day": 900}')""")
    await sql.execute("UPDATE keyproxy.users SET plan_id = 'p'")
    body = b'{"max_tokens": 5}'
    head = request("POST", "/v1/ai/jobs", f"Content-Length: {len(body)}", key=secret.encode())

    async def stores_are(number: int) -> bool:
        return bool(await sql.fetchval(_LISTENERS) == number)

    async with site.serving() as process, site.client() as client:
        await until(lambda: stores_are(1))
        await client.send(head + body[:5])

        async def has_begun() -> bool:
            return await site.metric("keyproxy_open_requests") == 1

        await until(has_begun)
        # First other routes, then another ledger: requests in flight are two configurations old.
        for changed in ('[[routes]]\nmatch = "GET /other"\n', "[ledger]\nsettle_seconds = 0.3\n"):
            with site.config.open("a", encoding="utf-8") as config:
                config.write(changed)
            site.printed.clear()
            process.send_signal(signal.SIGHUP)
            await site.until_logged("configuration reloaded")
        await until(lambda: stores_are(2))
        await client.send(body[5:])
        assert (await client.answer()).status == 200
        await until(lambda: stores_are(1))
    await sql.close()


#: (the change, the logged error)
MISTAKES = [
    (("listen", "worker = 2"), "listen.worker: no such key"),
    (("listen", "workers = 2"), "listen.workers: a reload cannot change between one worker and several"),
    (("listen", 'tls_certificate_file = "/nowhere.pem"'), "/nowhere.pem"),
    (("listen", 'trusted_proxies = ["nonsense"]'), "trusted_proxies"),
    (("listen", 'address = "192.0.2.1:80"'), "cannot listen on 192.0.2.1:80"),
    (("upstream", 'url = "gopher://a"'), "upstream.url"),
    (("store", 'dsn = "postgresql://nobody@127.0.0.1:1/none"'), "Connect"),
]


async def test_a_rejected_reload_changes_nothing_and_logs_the_reason(site: Site) -> None:
    secret = (await site.key())["secret"]
    before = site.config.read_text(encoding="utf-8")
    async with site.serving() as process:
        for mistake, message in MISTAKES:
            content = _with(before, *mistake) + '[log]\nlevel = "error"\n[[routes]]\nmatch = "GET /only"\n'
            site.config.write_text(content, encoding="utf-8")
            site.printed.clear()
            process.send_signal(signal.SIGHUP)
            await site.until_logged("reload rejected")
            assert message in b"".join(site.printed).decode()
            assert (await site.call(secret, "GET", "/other"))[0] == 200
        site.config.unlink()
        process.send_signal(signal.SIGHUP)
        await site.until_logged(str(site.config))
        site.config.write_text(before, encoding="utf-8")
        process.send_signal(signal.SIGHUP)
        # Logged at level info, which no rejected configuration has changed.
        await site.until_logged("configuration reloaded")


async def test_lines_of_the_access_log_stay_whole_if_several_workers_write_to_one_pipe(
    configure: Configure, dsn: str
) -> None:
    site = configure(dsn, listen={"workers": 2})
    secret = (await site.key())["secret"]
    reading, writing = os.pipe()
    # So that a write of several lines is seldom made at once.
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with Path(os.devnull).open("wb") as nowhere, os.fdopen(reading, "rb") as log:
        process = await site.start("serve", out=writing, err=nowhere.fileno())
        os.close(writing)
        try:
            await site.until_ready(process)
            load = Load(site, secret)
            async with load.running(connections=16):
                await more(load, 800)
        finally:
            process.send_signal(signal.SIGTERM)
            # Not before: both workers have a backlog.
            content, _ = await asyncio.gather(asyncio.to_thread(log.read), process.wait())
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["path"] for line in lines] == ["/"] * len(lines)
    assert len(lines) == load.answered
    assert not load.wrong


async def test_all_workers_reload_or_none_and_later_workers_match_the_others(
    configure: Configure, dsn: str, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    site = configure(dsn, listen={"workers": 2})
    secret = (await site.key())["secret"]
    before, only = site.config.read_text(encoding="utf-8"), '[[routes]]\nmatch = "GET /only"\n'
    async with site.serving() as process:

        async def change(content: str, message: str) -> None:
            site.config.write_text(content, encoding="utf-8")
            site.printed.clear()
            process.send_signal(signal.SIGHUP)
            await site.until_logged(message)

        async def replace_one(times: int) -> None:
            os.kill(workers_of(process.pid)[0], signal.SIGKILL)

            async def is_replaced() -> bool:
                ready = await site.metric("keyproxy_workers", state="ready")
                return await site.metric("keyproxy_worker_restarts_total") == times and ready == 2

            await until(is_replaced)

        # A worker without free file descriptors cannot read the new file; the other worker can.
        limited = workers_of(process.pid)[1]
        allowed = resource.prlimit(limited, resource.RLIMIT_NOFILE)
        resource.prlimit(limited, resource.RLIMIT_NOFILE, (3, allowed[1]))
        await change(_with(before, "upstream", f'tls_ca_file = "{tmp_path / "ca.pem"}"') + only, "ca.pem")
        await site.until_logged("keyproxy.process.supervisor: reload rejected")
        resource.prlimit(limited, resource.RLIMIT_NOFILE, allowed)
        assert await answers(site, secret) == {(200, "")}
        # An error that only the workers can detect.
        unreachable = _with(before, "store", 'dsn = "postgresql://nobody@127.0.0.1:1/none"') + only
        await change(unreachable, "keyproxy.process.supervisor: reload rejected: 127.0.0.1:1")
        await replace_one(1)
        assert await answers(site, secret) == {(200, "")}
        await change(unreachable.replace("workers = 2", "workers = 3"), "reload rejected: 127.0.0.1:1")
        assert len(workers_of(process.pid)) == 2
        await change(before + only, "keyproxy.process.supervisor: configuration reloaded")
        assert await answers(site, secret) == {(403, "route_not_allowed")}
        site.config.write_text("no configuration", encoding="utf-8")
        await replace_one(2)
        assert await answers(site, secret) == {(403, "route_not_allowed")}


async def answers(site: Site, secret: str) -> set[tuple[int, str]]:
    """The responses to enough calls, each on its own connection, to reach every worker."""
    return set(await asyncio.gather(*(site.call(secret, "GET", "/other") for _ in range(24))))


def _with(content: str, table: str, line: str) -> str:
    """Replace a line in a table of the configuration."""
    lines, key, here = [], line.partition(" ")[0], ""
    for one in content.splitlines():
        here = one.strip("[]") if one.startswith("[") else here
        if here != table or not one.startswith(f"{key} ="):
            lines += [one, line] if one == f"[{table}]" else [one]
    return "\n".join(lines) + "\n"


async def test_a_crashed_worker_is_replaced_and_its_counts_stay(configure: Configure, dsn: str) -> None:
    site = configure(dsn, listen={"workers": 2})
    secret = (await site.key())["secret"]
    async with site.serving() as process:
        for _ in range(20):
            assert (await site.call(secret))[0] == 200
        assert await site.metric("keyproxy_requests_total", status="200") == 20
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)

        async def is_replaced() -> bool:
            return await site.metric("keyproxy_worker_restarts_total") == 1 and (
                await site.metric("keyproxy_workers", state="ready") == 2
            )

        await until(is_replaced)
        assert await site.metric("keyproxy_requests_total", status="200") == 20
        status, page = await site.ops("/readyz")
        assert (status, '"workers":{"status":"ok"}' in page) == (200, True)
        for _ in range(10):
            assert (await site.call(secret))[0] == 200
        assert await site.metric("keyproxy_requests_total", status="200") == 30
        # A temporary failure to start a process must not be final.
        allowed = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, allowed[1]))
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        await site.until_logged("cannot start a worker")
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, allowed)

        async def is_replaced_again() -> bool:
            return await site.metric("keyproxy_worker_restarts_total") == 2

        await until(is_replaced_again)


async def test_workers_end_with_a_supervisor_that_was_killed(configure: Configure, dsn: str) -> None:
    site = configure(dsn, listen={"workers": 2})
    async with site.serving() as process:
        workers = workers_of(process.pid)
        assert len(workers) == 2
        process.kill()

        async def are_gone() -> bool:
            return not any(_is_alive(worker) for worker in workers)

        await until(are_gone)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


async def test_systemd_is_notified_of_readiness_reloads_and_stopping(site: Site) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        path = f"{directory}/notify"
        sock.bind(path)
        sock.settimeout(STUCK_SECONDS)
        site.environment["NOTIFY_SOCKET"] = path
        async with site.serving() as process:
            assert await asyncio.to_thread(sock.recv, 256) == b"READY=1"
            process.send_signal(signal.SIGHUP)
            assert (await asyncio.to_thread(sock.recv, 256)).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert await asyncio.to_thread(sock.recv, 256) == b"READY=1"
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(sock.recv, 256) == b"STOPPING=1"


async def test_the_subject_of_a_client_certificate_is_forwarded_upstream(
    configure: Configure, dsn: str, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    worker = authority.issue_cert("worker.acme", common_name="wörk,er", organization_name="Acme")
    worker.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "worker.pem"))
    tls = {"tls_certificate_file": str(tmp_path / "server.pem"), "tls_client_ca_file": str(tmp_path / "ca.pem")}
    site = configure(dsn, listen=tls)
    secret = (await site.key())["secret"].encode()
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    async with site.serving() as process:
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await _call_over_tls(site, context, secret)
        context.load_cert_chain(str(tmp_path / "worker.pem"))
        assert (await _call_over_tls(site, context, secret)).startswith(b"HTTP/1.1 200 ")
        seen = site.upstream.requests[-1]
        assert str(seen.one("X-Keyproxy-Client-Cert-Subject")).startswith(r"CN=w\C3\B6rk\2Cer,")
        assert seen.one("X-Forwarded-Proto") == "https"
        # A renewed certificate is used from the next handshake.
        other = trustme.CA()
        other.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
        process.send_signal(signal.SIGHUP)
        await site.until_logged("configuration reloaded")
        with pytest.raises(ssl.SSLCertVerificationError):
            await _call_over_tls(site, context, secret)


async def _call_over_tls(site: Site, context: ssl.SSLContext, secret: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.proxy_port, ssl=context)
    try:
        writer.write(request("GET", "/", "X-Keyproxy-Client-Cert-Subject: CN=root", "Connection: close", key=secret))
        async with asyncio.timeout(5):
            return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_an_https_upstream_is_verified(configure: Configure, dsn: str, tmp_path: Path, is_trusted: bool) -> None:
    authority = trustme.CA()
    (authority if is_trusted else trustme.CA()).cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        upstream = {"url": f"https://127.0.0.1:{port}", "tls_ca_file": str(tmp_path / "ca.pem")}
        site = configure(dsn, upstream=upstream)
        async with site.serving():
            outcome = await site.call((await site.key())["secret"])
            assert outcome == ((200, "") if is_trusted else (502, "upstream_unreachable"))
