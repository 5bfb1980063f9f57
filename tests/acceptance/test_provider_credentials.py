"""Credentials of upstreams as operators use them: replaced files, stored rows, revocations, and no trace of a secret."""

from __future__ import annotations

import asyncio
import base64
import collections
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from keyproxy.auth.api_key import KeyFormat
from keyproxy.config import loader
from keyproxy.process.providers.operator_secrets import OperatorSecrets
from keyproxy.store.directory.directory import Actor, Directory
from keyproxy.store.postgres.database import Database
from tests.acceptance.conftest import Configure, Site, until
from tests.acceptance.fleet import beside
from tests.rawhttp import Message, answer_with

ROUTES = [{"match": "POST /v1/ai/jobs", "provider": "openai"}, {"match": "POST /plain"}]

FIRST, SECOND, THIRD = "sk-first-0123456789abcdefghij", "sk-second-0123456789abcdefghi", "sk-third-0123456789abcdefghij"
UNAUTHORIZED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\n{}"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

#: The promise for a replaced file, and for a revocation.
FILE_SECONDS, REVOKED_SECONDS = 2.0, 1.0

HOUR = timedelta(hours=1)


@dataclass
class Ledger:
    """What the upstream has seen: (when, tenant, secret), and the secrets that it accepts."""

    accepted: set[str]
    seen: list[tuple[float, str, str]] = field(default_factory=list)
    delay_seconds: float = 0.0
    #: The id of a request that gets 401 with any secret.
    provoking: str = ""

    async def __call__(self, request: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        secret = (request.one("Authorization") or "").removeprefix("Bearer ")
        self.seen.append((time.monotonic(), request.one("X-Keyproxy-Tenant") or "", secret))
        await asyncio.sleep(self.delay_seconds)
        is_provoking = self.provoking != "" and request.one("X-Request-Id") == self.provoking
        return await answer_with(OK if secret in self.accepted and not is_provoking else UNAUTHORIZED)(
            request, reader, writer
        )

    def secrets(self, since: float = 0.0) -> set[str]:
        """The secrets of the requests since then."""
        return {secret for at, _, secret in self.seen if at >= since}


def replace(path: Path, content: str) -> None:
    """Replace a file as deployments do: whole, by renaming another."""
    other = path.with_name(path.name + ".new")
    other.write_text(content + "\n")
    os.replace(other, path)  # noqa: PTH105 - as the tool of a deployment does


def add_provider(site: Site, **values: str | bool) -> None:
    """Add a row of `[[providers]]` to a configuration."""
    texts = {name: str(value).lower() if isinstance(value, bool) else f'"{value}"' for name, value in values.items()}
    with site.config.open("a") as file:
        file.write("[[providers]]\n" + "".join(f"{name} = {text}\n" for name, text in texts.items()))


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    """A secret file with the first secret."""
    path = tmp_path / "secret"
    path.write_text(FIRST + "\n")
    return path


@pytest.fixture
def filed(configure: Configure, dsn: str, secret_file: Path) -> Site:
    """A site whose provider has its secret in a file."""
    site = configure(dsn, routes=ROUTES)
    add_provider(site, name="openai", secret_file=str(secret_file))
    return site


@pytest.fixture
def sealed(configure: Configure, dsn: str, secret_file: Path, tmp_path: Path) -> Site:
    """A site whose provider has stored secrets too, and a key that seals them."""
    key_file = tmp_path / "keys"
    key_file.write_text(f"k1:{base64.b64encode(b'seal' * 8).decode()}\n")
    site = configure(dsn, routes=ROUTES, secrets={"key_file": str(key_file)})
    add_provider(site, name="openai", secret_file=str(secret_file), sealed=True)
    return site


@pytest.fixture
async def directory(sealed: Site) -> AsyncIterator[Directory]:
    """The operations of an operator of the sealed site."""
    database = Database(sealed.dsn, pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    settings = loader.load(sealed.config, {}).settings
    yield Directory(database, KeyFormat(), Actor("test", "local"), secrets=OperatorSecrets(settings))
    await database.close()


async def _load(sites: Sequence[Site], secret: str, answers: collections.Counter[int], until_mono: float) -> None:
    async with aiohttp.ClientSession() as session:
        number = 0
        while time.monotonic() < until_mono:
            url = f"http://127.0.0.1:{sites[number % len(sites)].proxy_port}/v1/ai/jobs"
            async with session.post(url, data=b"{}", headers={"X-Api-Key": secret}) as response:
                answers[response.status] += 1
            number += 1


async def test_replaced_secret_file_fails_no_request_and_is_used_within_two_seconds(
    filed: Site, secret_file: Path
) -> None:
    ledger = Ledger({FIRST, SECOND})
    filed.upstream.answering = ledger
    other = beside(filed, filed.dsn)
    secret = (await filed.key())["secret"]
    answers: collections.Counter[int] = collections.Counter()
    async with filed.serving(), other.serving():
        began = time.monotonic()
        load = [asyncio.create_task(_load([filed, other], secret, answers, began + 6.0)) for _ in range(4)]
        await asyncio.sleep(1.0)
        replace(secret_file, SECOND)
        replaced = time.monotonic()
        await asyncio.gather(*load)
    assert set(answers) == {200}
    assert answers[200] > 50
    assert FIRST in ledger.secrets()
    assert ledger.secrets(since=replaced + FILE_SECONDS) == {SECOND}


async def test_previous_secret_is_used_while_the_upstream_refuses_the_newest(filed: Site, secret_file: Path) -> None:
    ledger = Ledger({FIRST})
    filed.upstream.answering = ledger
    secret = (await filed.key())["secret"]
    async with filed.serving():
        assert (await filed.call(secret))[0] == 200
        replace(secret_file, SECOND)
        await filed.until_logged("new content is in use")
        statuses = [(await filed.call(secret))[0] for _ in range(5)]
        assert statuses == [401, 200, 200, 200, 200]
        assert await filed.metric("keyproxy_provider_credential_failures_total", provider="openai") == 1.0
        assert 0.0 <= await filed.metric("keyproxy_provider_credential_age_seconds", provider="openai") < 600.0
        # Nothing was sent twice.
        assert len(ledger.seen) == 6


async def test_caller_that_provokes_a_401_fails_at_most_one_request_of_others(filed: Site, secret_file: Path) -> None:
    ledger = Ledger({FIRST, SECOND}, delay_seconds=0.2)
    filed.upstream.answering = ledger
    secret = (await filed.key())["secret"]
    answers: collections.Counter[int] = collections.Counter()
    async with filed.serving():
        replace(secret_file, SECOND)
        await filed.until_logged("new content is in use")
        ledger.accepted = {SECOND}
        began = time.monotonic()
        load = [asyncio.create_task(_load([filed], secret, answers, began + 3.0)) for _ in range(10)]
        await asyncio.sleep(0.5)
        ledger.provoking = "provoked"
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"http://127.0.0.1:{filed.proxy_port}/v1/ai/jobs",
                data=b"{}",
                headers={"X-Api-Key": secret, "X-Request-Id": "provoked"},
            ) as response,
        ):
            assert response.status == 401
        await asyncio.gather(*load)
    assert answers[401] <= 1
    assert answers[200] > 50


async def test_unreadable_or_invalid_file_leaves_the_last_good_secret_in_use(filed: Site, secret_file: Path) -> None:
    ledger = Ledger({FIRST, THIRD})
    filed.upstream.answering = ledger
    secret = (await filed.key())["secret"]
    async with filed.serving() as process:
        secret_file.unlink()
        await filed.until_logged("the last good content stays in use")
        assert (await filed.call(secret))[0] == 200
        replace(secret_file, "two\nlines")
        await filed.until_logged("the last good content stays in use", times=2)
        assert (await filed.call(secret))[0] == 200
        # A reload is refused as a whole only if a file that is new to it cannot be used.
        process.send_signal(signal.SIGHUP)
        await filed.until_logged("configuration reloaded")
        assert (await filed.call(secret))[0] == 200
        replace(secret_file, THIRD)
        await filed.until_logged("readable and valid again")
        assert (await filed.call(secret))[0] == 200
    assert ledger.seen[-1][2] == THIRD


async def test_reload_keeps_the_previous_secret_and_the_mark_of_a_refused_one(filed: Site, secret_file: Path) -> None:
    filed.upstream.answering = Ledger({FIRST})
    secret = (await filed.key())["secret"]
    async with filed.serving() as process:
        replace(secret_file, SECOND)
        await filed.until_logged("new content is in use")
        assert (await filed.call(secret))[0] == 401
        with filed.config.open("a") as file:
            file.write('[[routes]]\nmatch = "GET /other"\n')
        process.send_signal(signal.SIGHUP)
        await filed.until_logged("configuration reloaded")
        assert (await filed.call(secret))[0] == 200


@pytest.mark.parametrize("command", ["check", "serve"])
async def test_unusable_files_are_found_before_the_start(filed: Site, secret_file: Path, command: str) -> None:
    secret_file.write_text("")
    with filed.config.open("a") as file:
        file.write('[secrets]\nkey_file = "/nowhere/keys"\n')
    arguments = ("config", "check", "--offline") if command == "check" else ("serve",)
    output = await filed.run(*arguments)
    assert output.status == 2
    assert "providers[1].secret_file" in output.err
    if command == "check":
        assert "secrets.key_file: /nowhere/keys" in output.err


async def test_no_tenant_gets_the_credential_of_another_one(sealed: Site, directory: Directory) -> None:
    ledger = Ledger({FIRST, SECOND, THIRD})
    sealed.upstream.answering = ledger
    other = beside(sealed, sealed.dsn)
    keys = {
        tenant: (await sealed.key(f"u_{tenant}", tenant=tenant))["secret"] for tenant in ("acme", "globex", "plain")
    }
    await directory.provider_keys.add("openai", SECOND, tenant_id="acme")
    await directory.provider_keys.add("openai", THIRD, tenant_id="globex")
    answers: collections.Counter[int] = collections.Counter()
    async with sealed.serving(), other.serving():
        end = time.monotonic() + 2.0
        await asyncio.gather(*(_load([sealed, other], key, answers, end) for key in keys.values()))
    assert set(answers) == {200}
    pairs = {(tenant, secret) for _, tenant, secret in ledger.seen}
    assert pairs == {("acme", SECOND), ("globex", THIRD), ("plain", FIRST)}


async def test_revoked_credential_is_not_used_after_a_second_nor_the_shared_one_instead(
    sealed: Site, directory: Directory
) -> None:
    ledger = Ledger({FIRST, SECOND})
    sealed.upstream.answering = ledger
    secret = (await sealed.key())["secret"]
    made = await directory.provider_keys.add("openai", SECOND, tenant_id="acme")
    async with sealed.serving():
        assert (await sealed.call(secret))[0] == 200
        sql = await asyncpg.connect(sealed.dsn)
        await sql.execute("UPDATE keyproxy.provider_keys SET revoked_at = now() WHERE id = $1", made["id"])
        revoked = time.monotonic()
        await asyncio.sleep(REVOKED_SECONDS)
        answers = [await sealed.call(secret) for _ in range(5)]
        assert answers == [(503, "upstream_credential_unavailable")] * 5
        await sql.execute("DELETE FROM keyproxy.provider_keys")
        await sql.close()

        async def is_served() -> bool:
            return (await sealed.call(secret))[0] == 200

        await until(is_served)
    assert ledger.secrets(since=revoked + REVOKED_SECONDS) == {FIRST}


async def test_rotation_of_a_stored_credential_under_load_fails_no_request(sealed: Site, directory: Directory) -> None:
    ledger = Ledger({SECOND, THIRD})
    sealed.upstream.answering = ledger
    other = beside(sealed, sealed.dsn)
    secret = (await sealed.key())["secret"]
    made = await directory.provider_keys.add("openai", SECOND, tenant_id="acme")
    answers: collections.Counter[int] = collections.Counter()
    async with sealed.serving(), other.serving():
        end = time.monotonic() + 4.0
        load = [asyncio.create_task(_load([sealed, other], secret, answers, end)) for _ in range(4)]
        await asyncio.sleep(1.0)
        await directory.provider_keys.rotate(made["id"], THIRD, grace=HOUR)
        rotated = time.monotonic()
        await asyncio.gather(*load)
    assert set(answers) == {200}
    assert ledger.secrets(since=rotated + REVOKED_SECONDS) == {THIRD}


async def test_secrets_are_found_in_no_log_metric_error_table_or_command(
    sealed: Site, directory: Directory, secret_file: Path, tmp_path: Path
) -> None:
    canaries = (FIRST, SECOND, THIRD, base64.b64encode(b"seal" * 8).decode())
    with sealed.config.open("a") as file:
        file.write('[log]\nlevel = "debug"\n')
    sealed.upstream.answering = Ledger({SECOND})
    key = (await sealed.key())["secret"]
    outputs: list[str] = []
    added = tmp_path / "added"
    added.write_text(SECOND)
    async with sealed.serving() as process:
        # Refused by the upstream, twice; then a tenant's own; then a row that does not open; then none that is usable.
        for _ in range(2):
            assert (await sealed.call(key))[0] == 401
        output = await sealed.run(
            "provider-key", "add", "openai", "--tenant", "acme", "--secret-file", str(added), "--check", "--json"
        )
        outputs += [output.out, output.err]
        assert output.status == 0, output.err
        made = output.json["id"]
        added.write_text(THIRD)
        for arguments in (
            ("provider-key", "add", "openai", "--secret-file", str(added), "--check"),  # refused with 401
            ("provider-key", "add", "missing", "--secret-file", str(added)),
            ("provider-key", "list", "--json"),
            ("config", "show"),
            ("config", "show", "--json"),
            ("config", "check"),
            ("audit", "list", "--json"),
        ):
            output = await sealed.run(*arguments)
            outputs += [output.out, output.err]
        sql = await asyncpg.connect(sealed.dsn)
        await sql.execute("UPDATE keyproxy.provider_keys SET sealed_with = 'lost' WHERE id = $1", made)
        replace(secret_file, f"{FIRST} \x01 {THIRD}")

        async def is_refused() -> bool:
            return (await sealed.call(key))[0] == 503

        await until(is_refused)
        await sealed.until_logged("the last good content stays in use")
        process.send_signal(signal.SIGHUP)
        await sealed.until_logged("configuration reloaded")
        outputs += [(await sealed.ops(path))[1] for path in ("/metrics", "/readyz", "/livez")]
        outputs += [Path(f"/proc/{process.pid}/{name}").read_text() for name in ("cmdline", "environ")]
        tables = await sql.fetch("SELECT table_name FROM information_schema.tables WHERE table_schema = 'keyproxy'")
        outputs += [str(await sql.fetch(f'SELECT * FROM keyproxy."{row[0]}"')) for row in tables]
        await sql.close()
    content = "".join([*outputs, b"".join(sealed.printed).decode()])
    assert "upstream_credential_unavailable" in content
    for canary in canaries:
        assert canary not in content
        assert canary.encode().hex() not in content
        assert canary[:20] not in content
