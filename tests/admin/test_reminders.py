"""Reminders of keys that expire soon: each exactly once, with several senders and crashes; to a real receiver."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from keyproxy.admin.reminder_sender import Outcome, ReminderSender
from keyproxy.auth.api_key import KeyFormat
from keyproxy.cli import main
from keyproxy.config.schema import ReminderSettings as Terms
from keyproxy.store.directory.admin_tokens import AdminTokens
from keyproxy.store.directory.directory import Actor, Entity, KeyWish
from keyproxy.store.directory.reminders import ReminderQueue
from keyproxy.store.postgres.database import Database
from tests.acceptance.conftest import clean_environment
from tests.admin.conftest import Api
from tests.rawhttp import free_port

KEY = b"the-key-of-the-webhook-of-tests!"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
DAYS = [14, 3, 1]

Answer = Callable[[web.Request], Any]


@dataclass
class Receiver:
    """A webhook receiver: records the requests, and responds as configured."""

    url: str = ""
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    #: Statuses to respond with, then 204.
    statuses: list[int] = field(default_factory=list)
    on_request: Callable[[], Any] | None = None

    async def handle(self, request: web.Request) -> web.Response:
        """Keep one."""
        self.got.append((dict(request.headers), await request.read()))
        if self.on_request is not None:
            await self.on_request()
        status = self.statuses.pop(0) if self.statuses else 204
        return web.Response(status=status, headers={"Location": self.url + "/elsewhere"} if status == 307 else {})

    @property
    def ids(self) -> list[str]:
        """The ids of the received messages."""
        return [headers["Webhook-Id"] for headers, _ in self.got]

    @property
    def received(self) -> list[dict[str, Any]]:
        """The contents of the messages."""
        return [json.loads(body) for _, body in self.got]

    @property
    def terms(self) -> Terms:
        """The configuration for this receiver."""
        return Terms(self.url, SECRET, DAYS)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver on its own port."""
    receiver, app = Receiver(), web.Application()
    app.router.add_post("/{path:.*}", receiver.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port := free_port())
    await site.start()
    receiver.url = f"http://127.0.0.1:{port}/hook"
    yield receiver
    await runner.cleanup()


@pytest.fixture
def reminding(database: Database) -> ReminderSender:
    """A sender."""
    return ReminderSender(ReminderQueue(database))


MakeKey = Callable[..., Any]


@pytest.fixture
async def make_key(api: Api, sql: Any) -> MakeKey:
    """`await make_key(expires_in_days, of=issued_for_days)`: a key that was issued a while ago."""
    await api.user()

    async def making(expires_in_days: float, *, of: float = 90, **wish: Any) -> Entity:
        key = await api.directory.keys.issue("u_1", KeyWish(expires_in=timedelta(days=of), **wish))
        ago = timedelta(days=of - expires_in_days)
        await sql.execute(
            "UPDATE keyproxy.api_keys SET created_at = created_at - $2::interval,"
            " expires_at = expires_at - $2 WHERE id = $1",
            key["id"], ago,
        )  # fmt: skip
        return {**await api.directory.keys.get(key["id"]), "secret": key["secret"]}

    return making


async def _later(sql: Any) -> None:
    """Make every pending retry due."""
    await sql.execute("UPDATE keyproxy.reminders SET next_at = now()")


async def test_a_reminder_is_signed_and_names_the_owner_but_no_secret(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver
) -> None:
    key = await make_key(2.5, name="nightly", is_test=True)
    before = int(time.time())
    assert await reminding.turn(receiver.terms) == Outcome(sent=1)
    ((headers, body),) = receiver.got
    signed = f"{headers['Webhook-Id']}.{headers['Webhook-Timestamp']}.".encode() + body
    right = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["Webhook-Signature"] == f"v1,{right}"
    assert before <= int(headers["Webhook-Timestamp"]) <= time.time()
    assert headers["Content-Type"] == "application/json"
    found = json.loads(body)
    assert found["type"] == "key.expiring"
    assert found["data"] == {
        "key": key["id"], "user": "u_1", "tenant": "acme", "mode": "test", "hint": key["hint"], "name": "nightly",
        "expires_at": key["expires_at"], "before_days": 3,
    }  # fmt: skip
    assert key["secret"].encode() not in body
    assert hashlib.sha256(key["secret"].encode()).hexdigest().encode() not in body


async def test_each_threshold_is_sent_once_and_several_passed_ones_are_combined(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, sql: Any
) -> None:
    key = await make_key(13.9)
    await make_key(14.1)
    await make_key(0.5, of=0.9)  # issued for less than the nearest threshold: the expiry is expected
    for _ in range(2):
        await reminding.turn(receiver.terms)
    assert [(event["data"]["key"], event["data"]["before_days"]) for event in receiver.received] == [(key["id"], 14)]
    # No sender ran for 13 days: only the nearest threshold is sent, not all of them.
    await sql.execute(
        "UPDATE keyproxy.api_keys SET expires_at = expires_at - interval '13 days' WHERE id = $1", key["id"]
    )
    for _ in range(2):
        await reminding.turn(receiver.terms)
    assert [event["data"]["before_days"] for event in receiver.received] == [14, 1]
    assert len(set(receiver.ids)) == 2


async def test_what_was_not_received_is_sent_again_under_its_id_until_it_is(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, sql: Any
) -> None:
    await make_key(2)
    receiver.statuses = [500, 404, 307, 301]
    for number in range(1, 5):
        assert await reminding.turn(receiver.terms) == Outcome(failed=1)
        assert len(receiver.got) == number, "a redirect is not followed"
        assert await reminding.turn(receiver.terms) == Outcome(), "not at once"
        await _later(sql)
    assert await reminding.turn(receiver.terms) == Outcome(sent=1)
    await _later(sql)
    assert await reminding.turn(receiver.terms) == Outcome()
    assert len(receiver.got) == 5
    assert len(set(receiver.ids)) == 1
    assert len({body for _, body in receiver.got}) == 1


async def test_waits_between_attempts_grow_within_a_bound_and_end(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, sql: Any, caplog: pytest.LogCaptureFixture
) -> None:
    key = await make_key(2)
    receiver.statuses = [503] * 20
    waits = []
    for _ in range(9):
        await reminding.turn(receiver.terms)
        waits.append(await sql.fetchval("SELECT extract(epoch FROM next_at - now())::float8 FROM keyproxy.reminders"))
        await _later(sql)
    for wait, wanted in zip(waits[:8], [10, 60, 360, 2160, 12960, 21600, 21600, 21600], strict=True):
        assert 0.79 * wanted - 2 < wait <= 1.21 * wanted
    assert await sql.fetchval("SELECT given_up_at IS NOT NULL FROM keyproxy.reminders") is True
    assert await reminding.turn(receiver.terms) == Outcome()
    assert len(receiver.got) == 9
    assert reminding.total == Outcome(sent=0, failed=9, given_up=1)
    assert f"reminder of key {key['id']} abandoned: the receiver responded with status 503" in caplog.text


async def test_a_receiver_that_responds_gone_gets_no_more_attempts(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver
) -> None:
    await make_key(2)
    receiver.statuses = [410]
    assert await reminding.turn(receiver.terms) == Outcome(failed=1, given_up=1)


async def test_timeouts_and_refused_connections_are_recorded_failures(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, sql: Any
) -> None:
    await make_key(2)
    silence = asyncio.Event()
    receiver.on_request = silence.wait
    reminding.attempt_seconds = 0.1
    assert await reminding.turn(receiver.terms) == Outcome(failed=1)
    assert await sql.fetchval("SELECT last_error FROM keyproxy.reminders") == "timeout: no response within 0.1 s"
    await _later(sql)
    nobody = Terms(f"http://127.0.0.1:{free_port()}/", SECRET, DAYS)
    assert await reminding.turn(nobody) == Outcome(failed=1)
    assert "ClientConnectorError" in await sql.fetchval("SELECT last_error FROM keyproxy.reminders")
    receiver.on_request = None
    await _later(sql)
    assert await reminding.turn(receiver.terms) == Outcome(sent=1)
    assert len(set(receiver.ids)) == 1
    silence.set()


async def test_a_failing_receiver_does_not_get_the_whole_batch(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, sql: Any
) -> None:
    key = await make_key(2)
    await sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest, created_at, expires_at)"
        " SELECT 'k_' || n, user_id, sha256(int4send(n)), created_at, expires_at"
        " FROM keyproxy.api_keys, generate_series(1, 50) AS n WHERE id = $1",
        key["id"],
    )
    receiver.statuses = [500] * 20
    assert await reminding.turn(receiver.terms) == Outcome(failed=20)
    assert await reminding.turn(receiver.terms) == Outcome(sent=31)


async def test_of_several_senders_at_once_one_sends_each(
    make_key: MakeKey, database: Database, receiver: Receiver
) -> None:
    keys = [(await make_key(2))["id"] for _ in range(8)]
    senders = [ReminderSender(ReminderQueue(database)) for _ in range(4)]
    found = await asyncio.gather(*(sender.turn(receiver.terms) for sender in senders))
    assert sum(outcome.sent for outcome in found) == 8
    assert sorted(event["data"]["key"] for event in receiver.received) == sorted(keys)


@pytest.mark.parametrize("act", ["revoke", "rotate", "delete", "expire", "extend", "disable user", "disable tenant"])
async def test_no_reminder_is_sent_for_a_key_that_ended_or_was_replaced_meanwhile(
    act: str, make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, api: Api, sql: Any
) -> None:
    key = (await make_key(2))["id"]
    receiver.statuses = [500]
    await reminding.turn(receiver.terms)
    match act:
        case "revoke":
            await api.directory.keys.revoke(key, "")
        case "rotate":
            await api.directory.keys.rotate(key, grace=timedelta(hours=1), expires_in=timedelta(days=90))
        case "delete":
            await api.directory.keys.delete(key)
        case "expire":
            await sql.execute("UPDATE keyproxy.api_keys SET expires_at = now() WHERE id = $1", key)
        case "extend":
            await sql.execute("UPDATE keyproxy.api_keys SET expires_at = now() + interval '80 days' WHERE id = $1", key)
        case "disable user":
            await api.directory.users.change("u_1", {"disabled": True})
        case "disable tenant":
            await api.directory.tenants.change("acme", {"disabled": True})
    await _later(sql)
    assert await reminding.turn(receiver.terms) == Outcome()
    assert len(receiver.got) == 1
    assert await reminding.reminders.count_waiting() == 0


async def test_a_user_that_is_enabled_again_is_reminded_under_the_same_id(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, api: Api, sql: Any
) -> None:
    await make_key(2)
    receiver.statuses = [500]
    await reminding.turn(receiver.terms)
    for disabled in (True, False):
        await api.directory.users.change("u_1", {"disabled": disabled})
        await _later(sql)
        await reminding.turn(receiver.terms)
    assert len(receiver.got) == 2
    assert len(set(receiver.ids)) == 1


async def test_a_key_that_ended_before_its_reminder_was_delivered_is_logged(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, sql: Any, caplog: pytest.LogCaptureFixture
) -> None:
    key = (await make_key(0.5))["id"]
    receiver.statuses = [500]
    await reminding.turn(receiver.terms)
    await sql.execute("UPDATE keyproxy.api_keys SET expires_at = now()")
    await sql.execute(
        "UPDATE keyproxy.reminders SET expires_at = (SELECT expires_at FROM keyproxy.api_keys WHERE id = $1)", key
    )
    assert await reminding.turn(receiver.terms) == Outcome(given_up=1)
    assert f"reminder of key {key} abandoned: already expired; the receiver responded with status 500" in caplog.text
    assert await reminding.turn(receiver.terms) == Outcome()


async def test_a_reminder_has_the_same_id_in_a_restored_database(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, sql: Any
) -> None:
    await make_key(2)
    await reminding.turn(receiver.terms)
    await sql.execute("DELETE FROM keyproxy.reminders")  # written after the backup
    await reminding.turn(receiver.terms)
    assert len(receiver.got) == 2
    assert len(set(receiver.ids)) == 1


async def test_what_is_long_over_is_forgotten(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, sql: Any
) -> None:
    await make_key(2)
    await reminding.turn(receiver.terms)
    for age, left in (("29 days", 1), ("31 days", 0)):
        await sql.execute(f"UPDATE keyproxy.reminders SET expires_at = now() - interval '{age}'")
        await sql.execute("UPDATE keyproxy.api_keys SET expires_at = now()")
        await reminding.turn(receiver.terms)
        assert await sql.fetchval("SELECT count(*) FROM keyproxy.reminders") == left


# -- tokens of the admin API


MakeToken = Callable[..., Any]


@pytest.fixture
async def make_token(api: Api, database: Database, sql: Any) -> MakeToken:
    """`await make_token(expires_in_days)`: a token that was created 90 days before its expiry."""
    await api.user()

    async def making(expires_in_days: float, **wish: Any) -> Entity:
        tokens = AdminTokens(database, KeyFormat("kp"), Actor("test", "tests"))
        wish = {"tenant_id": None, "expires_in": timedelta(days=90)} | wish
        token = await tokens.create("nightly export", ["keys:read"], **wish)
        await sql.execute(
            "UPDATE keyproxy.admin_tokens SET created_at = created_at - $2::interval,"
            " expires_at = expires_at - $2 WHERE id = $1",
            token["id"], timedelta(days=90 - expires_in_days),
        )  # fmt: skip
        (now,) = [one for one in await tokens.tokens("", 100) if one["id"] == token["id"]]
        return {**now, "secret": token["secret"]}

    return making


async def test_an_expiring_admin_token_causes_a_reminder_without_a_secret(
    make_token: MakeToken, make_key: MakeKey, reminding: ReminderSender, receiver: Receiver
) -> None:
    token, bound = await make_token(2.5), await make_token(13, tenant_id="acme")
    key = await make_key(2.5)
    await make_token(14.1)
    assert await reminding.turn(receiver.terms) == Outcome(sent=3)
    found = {one["data"].get("token") or one["data"]["key"]: one for one in receiver.received}
    assert found[token["id"]]["type"] == "admin_token.expiring"
    assert found[token["id"]]["data"] == {
        "token": token["id"], "tenant": None, "hint": token["hint"], "name": "nightly export",
        "expires_at": token["expires_at"], "before_days": 3,
    }  # fmt: skip
    assert found[bound["id"]]["data"]["tenant"] == "acme"
    assert found[key["id"]]["type"] == "key.expiring"
    assert token["secret"].encode() not in b"".join(body for _, body in receiver.got)
    assert await reminding.turn(receiver.terms) == Outcome()
    assert len(set(receiver.ids)) == 3


@pytest.mark.parametrize("act", ["revoke", "delete tenant", "disable tenant", "expire", "extend"])
async def test_a_token_that_ended_meanwhile_is_no_reminder(
    act: str, make_token: MakeToken, reminding: ReminderSender, receiver: Receiver, api: Api, sql: Any
) -> None:
    token = (await make_token(2, tenant_id="acme"))["id"]
    receiver.statuses = [500]
    assert await reminding.turn(receiver.terms) == Outcome(failed=1)
    match act:
        case "revoke":
            await sql.execute("UPDATE keyproxy.admin_tokens SET revoked_at = now() WHERE id = $1", token)
        case "delete tenant":
            await sql.execute("DELETE FROM keyproxy.tenants WHERE id = 'acme'")
        case "disable tenant":
            await api.directory.tenants.change("acme", {"disabled": True})
        case "expire":
            await sql.execute("UPDATE keyproxy.admin_tokens SET expires_at = now() WHERE id = $1", token)
        case "extend":
            await sql.execute("UPDATE keyproxy.admin_tokens SET expires_at = now() + interval '80 days'")
    await _later(sql)
    assert await reminding.turn(receiver.terms) == Outcome()
    assert len(receiver.got) == 1
    assert await reminding.reminders.count_waiting() == 0


async def test_a_token_that_expires_before_its_reminder_is_received_is_logged(
    make_token: MakeToken, reminding: ReminderSender, receiver: Receiver, sql: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="keyproxy.admin.reminder_sender")
    token = (await make_token(0.5))["id"]
    receiver.statuses = [500]
    await reminding.turn(receiver.terms)
    assert [(row["token"], row["key"]) for row in await reminding.reminders.waiting(9)] == [(token, None)]
    assert f"reminder of admin token {token} failed, attempt 1" in caplog.text
    await sql.execute("UPDATE keyproxy.admin_tokens SET expires_at = now()")
    await sql.execute("UPDATE keyproxy.reminders SET expires_at = (SELECT expires_at FROM keyproxy.admin_tokens)")
    assert await reminding.turn(receiver.terms) == Outcome(given_up=1)
    assert f"reminder of admin token {token} abandoned: already expired" in caplog.text


# -- the command, and processes that die


def _configured(directory: Path, dsn: str, receiver: Receiver) -> Path:
    path = directory / "keyproxy.toml"
    path.write_text(
        f"[store]\ndsn = {json.dumps(dsn)}\n[reminders]\nwebhook_url = {json.dumps(receiver.url)}\n"
        f"webhook_secret = {json.dumps(SECRET)}\n"
    )
    return path


async def test_a_sender_that_is_killed_between_sending_and_marking_is_followed_by_the_same_id(
    make_key: MakeKey, reminding: ReminderSender, receiver: Receiver, sql: Any, tmp_path: Path, dsn: str
) -> None:
    await make_key(2)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "keyproxy", "key", "remind", "--config", str(_configured(tmp_path, dsn, receiver)),
        env=clean_environment(tmp_path), stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip

    async def kill() -> None:
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()

    receiver.on_request = kill
    async with asyncio.timeout(60):
        assert await process.wait() == -signal.SIGKILL
    receiver.on_request = None
    assert await reminding.turn(receiver.terms) == Outcome(), "its claim lasts"
    await _later(sql)
    assert await reminding.turn(receiver.terms) == Outcome(sent=1)
    assert len(receiver.got) == 2
    assert len(set(receiver.ids)) == 1


async def test_a_running_admin_process_reminds_by_itself(
    make_key: MakeKey, receiver: Receiver, tmp_path: Path, dsn: str
) -> None:
    await make_key(2)
    environment = clean_environment(tmp_path) | {"KEYPROXY_ADMIN__ADDRESS": f"127.0.0.1:{free_port()}"}
    received = asyncio.Event()

    async def note() -> None:
        received.set()

    receiver.on_request = note
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "keyproxy", "admin", "--config", str(_configured(tmp_path, dsn, receiver)),
        env=environment, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            await received.wait()
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert len(receiver.got) == 1


async def test_the_command_lists_due_reminders_sends_them_and_reports_failures(
    make_key: MakeKey, receiver: Receiver, tmp_path: Path, dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = (await make_key(2))["id"]
    config = str(_configured(tmp_path, dsn, receiver))

    async def run(*arguments: str) -> tuple[int, Any, str]:
        status = await asyncio.to_thread(main, ["key", "remind", "--json", "--config", config, *arguments])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    status, listed, _ = await run("--dry-run")
    assert (status, [(row["key"], row["attempts"]) for row in listed]) == (0, [(key, 0)])
    assert receiver.got == []
    receiver.statuses = [500]
    status, found, err = await run()
    assert (status, found) == (1, {"sent": 0, "failed": 1, "given_up": 0})
    assert err.splitlines()[-1].startswith("keyproxy: some reminders were not delivered")
    _, listed, _ = await run("--dry-run")
    assert [(row["attempts"], row["last_error"]) for row in listed] == [(1, "the receiver responded with status 500")]
    Path(config).write_text(f"[store]\ndsn = {json.dumps(dsn)}")
    assert (await run())[0] == 2


# -- metrics


async def test_the_metrics_count_keys_that_end_soon_by_when_and_mode(make_key: MakeKey, api: Api) -> None:
    for days, is_test in ((0.5, False), (6, False), (6, True), (29, False), (31, False)):
        await make_key(days, is_test=is_test)
    await api.directory.keys.revoke((await make_key(3))["id"], "")
    await api.directory.keys.rotate((await make_key(3))["id"], grace=timedelta(days=1), expires_in=timedelta(days=90))
    page = (await api.call("GET", "/metrics", token=await api.token("metrics:read"))).body.decode()
    for within, live, test in (("1d", 1, 0), ("7d", 2, 1), ("30d", 3, 1)):
        assert f'keyproxy_keys_expiring{{mode="live",within="{within}"}} {live}.0' in page
        assert f'keyproxy_keys_expiring{{mode="test",within="{within}"}} {test}.0' in page
    assert "keyproxy_reminders_waiting 0.0" in page
    assert 'keyproxy_reminders_total{result="sent"} 0.0' in page
    assert "keyproxy_store_up 1.0" in page


async def test_frequent_scrapes_cause_only_one_query(make_key: MakeKey, api: Api) -> None:
    def live(page: bytes) -> bool:
        return b'keyproxy_keys_expiring{mode="live",within="1d"} 1.0' in page

    async def scraped() -> bytes:
        return (await api.call("GET", "/metrics")).body

    assert not live(await scraped())
    await make_key(0.5)
    assert not live(await scraped())
    api.now[0] += 15
    assert live(await scraped())


async def test_metrics_are_for_tokens_that_may_read_them_and_see_all_tenants(api: Api) -> None:
    await api.user()
    assert (await api.call("GET", "/metrics", token=None)).code == "token_missing"
    assert (await api.call("GET", "/metrics", token=await api.token("keys:read"))).code == "insufficient_scope"
    bound = await api.token("admin:read", tenant="acme")
    assert (await api.call("GET", "/metrics", token=bound)).code == "tenant_bound"
    assert (await api.call("GET", "/metrics", token=await api.token("admin:read"))).status == 200


async def test_metrics_report_an_unavailable_store_and_no_stale_values(api: Api) -> None:
    await api.database.close()
    page = (await api.call("GET", "/metrics")).body.decode()
    assert "keyproxy_store_up 0.0" in page
    assert "keyproxy_keys_expiring{" not in page


async def test_the_metrics_export_the_expiry_of_admin_tokens(make_token: MakeToken, api: Api, sql: Any) -> None:
    tokens = [(await make_token(days))["id"] for days in (6, 0.5, 29, 31)]
    revoked = (await make_token(3))["id"]
    await sql.execute("UPDATE keyproxy.admin_tokens SET revoked_at = now() WHERE id = $1", revoked)
    await sql.execute("UPDATE keyproxy.admin_tokens SET expires_at = 'infinity' WHERE id = $1", tokens[3])
    page = (await api.call("GET", "/metrics")).body.decode()
    for within, count in (("1d", 1), ("7d", 2), ("30d", 3)):
        assert f'keyproxy_admin_tokens_expiring{{within="{within}"}} {count}.0' in page
    found = dict(re.findall(r'keyproxy_admin_token_expires_timestamp_seconds\{token="(\w+)"\} (\S+)', page))
    assert list(found) == [tokens[1], tokens[0], tokens[2]]
    for token, days in zip(found, (0.5, 6, 29), strict=True):
        assert abs(float(found[token]) - time.time() - days * 86_400) < 60


async def test_the_metrics_count_requests_to_the_admin_api_and_failed_logins(api: Api) -> None:
    await api.user()

    async def counted() -> dict[str, float]:
        page = (await api.call("GET", "/metrics")).body.decode()
        found = re.findall(r"(?m)^(keyproxy_admin_(?:requests|failed_logins)_total\{.*?\}) (\S+)$", page)
        return {name: float(value) for name, value in found}

    before = await counted()
    await api.call("GET", "/v1/tenants/acme")
    await api.call("HEAD", "/v1/tenants/acme")
    await api.call("GET", "/v1/tenants/nobody")
    await api.call("GET", "/nowhere")
    await api.call("PATCH", "/v1/tenants")
    await api.call("GET", "/v1/tenants/acme", token=None)
    await api.call("GET", "/v1/tenants/acme", token="x" * 40)
    after = await counted()
    requests = 'keyproxy_admin_requests_total{class="%s",method="GET",route="%s"}'
    assert {name: value - before[name] for name, value in after.items() if value != before[name]} == {
        requests % ("2xx", "/v1/tenants/{id}"): 2, requests % ("4xx", "/v1/tenants/{id}"): 3,
        requests % ("2xx", "/metrics"): 1,
        'keyproxy_admin_requests_total{class="4xx",method="none",route="none"}': 2,
        'keyproxy_admin_failed_logins_total{code="token_missing"}': 1,
        'keyproxy_admin_failed_logins_total{code="token_invalid"}': 1,
    }  # fmt: skip
