"""Alerts of limits that are nearly spent: one per window and percentage, delivered under one id by any sender."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keyproxy.admin.webhook_sender import RESULTS, Outcome, WebhookSender
from keyproxy.admin.webhooks import Webhooks
from keyproxy.config.schema import AlertSettings, Settings
from keyproxy.limits.ledger_protocol import LeaseReport, Pool, Window
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.outbox.limit_alerts import LimitAlertQueue
from keyproxy.store.outbox.message import KINDS
from keyproxy.store.postgres.database import Database
from tests.acceptance.conftest import clean_environment
from tests.admin.conftest import Api, serving
from tests.rawhttp import free_port
from tests.waiting import until
from tests.webhook_receiver import SECRET, Receiver, right_signature

PERCENTAGES = [80, 100]


def terms(receiver: Receiver) -> AlertSettings:
    """The configuration for a receiver."""
    return AlertSettings(PERCENTAGES, receiver.url, SECRET)


@pytest.fixture
def queue(database: Database) -> LimitAlertQueue:
    """The queue of alerts."""
    return LimitAlertQueue(database, lambda: PERCENTAGES)


@pytest.fixture
def sender(queue: LimitAlertQueue) -> WebhookSender:
    """A sender."""
    return WebhookSender(queue, "alerts")


class Spender:
    """A proxy that spends units of windows."""

    def __init__(self, database: Database) -> None:
        self._ledger = PostgresLedger(database, lease_seconds=60.0, alert_percentages=PERCENTAGES)
        self._serial = 0

    async def spend(self, window: Window, units: int, *, limit: int = 100, at_least: int | None = None) -> int:
        """Spend units of a window. Returns how many were granted."""
        asked = LeaseReport(
            self._serial + 1, window, 0, limit, 0.0, 0, 0, 0, units, at_least or units, units, is_closing=False
        )
        (reply,) = await self._sync(asked)
        await self._sync(
            asked._replace(granted=reply.granted, used=reply.granted, want=0, at_least=0, most=0, is_closing=True)
        )
        return int(reply.granted)

    async def _sync(self, line: LeaseReport) -> Any:
        self._serial += 1
        return await self._ledger.sync("spender", self._serial, [line])


@pytest.fixture
def spender(database: Database) -> Spender:
    """A proxy that spends units."""
    return Spender(database)


def window_of(
    user: str = "u_1", measure: str = "tokens_per_day", selector: str = "", *, is_test: bool = False
) -> Window:
    """A window of a user."""
    return Window(Pool("user", user, is_test), measure, selector)


async def _later(sql: Any) -> None:
    """Make every pending retry due."""
    await sql.execute("UPDATE keyproxy.limit_alerts SET next_at = now()")


async def test_an_alert_is_signed_and_describes_the_window(
    api: Api, spender: Spender, sender: WebhookSender, receiver: Receiver
) -> None:
    await api.user("u_1", "acme")
    await spender.spend(window_of("u_1", "spend_per_month", "model:gpt-4o", is_test=True), 79)
    assert await sender.turn(terms(receiver)) == Outcome()
    await spender.spend(window_of("u_1", "spend_per_month", "model:gpt-4o", is_test=True), 5)
    before = datetime.now(UTC)
    assert await sender.turn(terms(receiver)) == Outcome(sent=1)
    ((headers, body),) = receiver.got
    assert headers["Webhook-Signature"] == right_signature(headers, body)
    found = json.loads(body)
    assert (set(found), found["type"]) == ({"type", "timestamp", "data"}, "limit.threshold")
    assert abs(datetime.fromisoformat(found["timestamp"]) - before) < timedelta(seconds=30)
    starts = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    ends = (starts + timedelta(days=32)).replace(day=1)
    assert found["data"] == {
        "pool_kind": "user", "pool_id": "u_1", "tenant": "acme", "mode": "test", "limit": "spend/month",
        "selector": "model:gpt-4o", "percentage": 80, "amount": 100, "spent": 84,
        "window_starts": f"{starts:%Y-%m-%dT%H:%M:%SZ}", "window_ends": f"{ends:%Y-%m-%dT%H:%M:%SZ}",
    }  # fmt: skip


async def test_each_window_and_percentage_is_sent_once_and_100_also_at_the_first_refusal(
    spender: Spender, sender: WebhookSender, receiver: Receiver
) -> None:
    for units in (80, 1, 1):
        await spender.spend(window_of(), units)
    await spender.spend(window_of("u_2"), 100)
    await sender.turn(terms(receiver))
    assert await spender.spend(window_of(), 30) == 0
    assert await spender.spend(window_of(), 30) == 0
    for _ in range(2):
        await sender.turn(terms(receiver))
    found = [(one["data"]["pool_id"], one["data"]["percentage"], one["data"]["spent"]) for one in receiver.received]
    assert sorted(found[:3]) == [("u_1", 80, 80), ("u_2", 80, 100), ("u_2", 100, 100)]
    assert found[3:] == [("u_1", 100, 82)]
    assert len(set(receiver.ids)) == 4


async def test_an_alert_is_sent_again_under_its_id_until_it_is_received(
    spender: Spender, sender: WebhookSender, receiver: Receiver, sql: Any
) -> None:
    await spender.spend(window_of(), 85)
    receiver.statuses = [500, 301]
    for _ in range(2):
        assert await sender.turn(terms(receiver)) == Outcome(failed=1)
        assert await sender.turn(terms(receiver)) == Outcome(), "not at once"
        await _later(sql)
        await spender.spend(window_of(), 1)
    assert await sender.turn(terms(receiver)) == Outcome(sent=1)
    await _later(sql)
    assert await sender.turn(terms(receiver)) == Outcome()
    assert len(receiver.got) == 3
    assert len(set(receiver.ids)) == 1
    assert len({body for _, body in receiver.got}) == 1


async def test_attempts_end_after_the_ninth(
    spender: Spender, sender: WebhookSender, receiver: Receiver, sql: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await spender.spend(window_of(), 85)
    receiver.statuses = [503] * 20
    for _ in range(10):
        await sender.turn(terms(receiver))
        await _later(sql)
    assert len(receiver.got) == 9
    assert sender.total == Outcome(sent=0, failed=9, given_up=1)
    assert "alert of tokens/day of user u_1 at 80 % abandoned: the receiver responded with status 503" in caplog.text


async def test_a_webhook_that_is_configured_later_gets_no_alerts_of_the_past(
    spender: Spender, sender: WebhookSender, receiver: Receiver, sql: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await spender.spend(window_of(), 85)
    await spender.spend(window_of("u_2"), 85)
    await sql.execute(
        "UPDATE keyproxy.limit_alerts AS a SET next_at = next_at - interval '25 hours' FROM keyproxy.windows AS w"
        " WHERE w.id = a.window_id AND w.pool_id = 'u_1'"
    )
    assert await sender.turn(terms(receiver)) == Outcome(sent=1, given_up=1)
    assert [one["data"]["pool_id"] for one in receiver.received] == ["u_2"]
    assert "1 alerts abandoned: not sent within 24 hours" in caplog.text
    assert await sender.turn(terms(receiver)) == Outcome()


async def test_of_several_senders_at_once_one_sends_each(
    spender: Spender, database: Database, receiver: Receiver
) -> None:
    for number in range(12):
        await spender.spend(window_of(f"u_{number}"), 85)
    senders = [WebhookSender(LimitAlertQueue(database)) for _ in range(4)]
    found = await asyncio.gather(*(one.turn(terms(receiver)) for one in senders))
    assert sum(outcome.sent for outcome in found) == 12
    assert sorted(one["data"]["pool_id"] for one in receiver.received) == sorted(f"u_{n}" for n in range(12))


async def test_the_metrics_count_delivered_alerts_by_percentage_and_all_messages_by_kind_and_result(
    database: Database, spender: Spender, receiver: Receiver
) -> None:
    async def counted(api: Api, name: str = "limit_alerts") -> list[str]:
        page = (await api.call("GET", "/metrics")).body.decode()
        return [line for line in page.splitlines() if line.startswith(f"keyproxy_{name}_total{{")]

    webhooks = Webhooks(database, lambda: Settings(alerts=terms(receiver)))
    async with serving(database, webhooks=webhooks) as api:
        assert await counted(api) == [f'keyproxy_limit_alerts_total{{percentage="{one}"}} 0.0' for one in (80, 100)]
        for user in ("u_1", "u_2"):
            await spender.spend(window_of(user), 85)
        receiver.statuses = [500]
        await webhooks.alerting.turn(terms(receiver))
        assert await counted(api) == [
            'keyproxy_limit_alerts_total{percentage="80"} 1.0',
            'keyproxy_limit_alerts_total{percentage="100"} 0.0',
        ]
        deliveries = await counted(api, "webhook_deliveries")
        assert len(deliveries) == len(KINDS) * len(RESULTS)
        assert [line for line in deliveries if not line.endswith(" 0.0")] == [
            'keyproxy_webhook_deliveries_total{kind="limit.threshold",result="sent"} 1.0',
            'keyproxy_webhook_deliveries_total{kind="limit.threshold",result="failed"} 1.0',
        ]


# -- processes


class Admin:
    """Starts processes of `keyproxy admin` that deliver to a receiver."""

    def __init__(self, directory: Path, dsn: str, receiver: Receiver) -> None:
        self._directory = directory
        self._config = directory / "keyproxy.toml"
        self._config.write_text(
            f"[store]\ndsn = {json.dumps(dsn)}\n[alerts]\nwebhook_url = {json.dumps(receiver.url)}\n"
            f"webhook_secret = {json.dumps(SECRET)}\n"
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """A process that serves; it is terminated at the end of the context, unless the test has killed it."""
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "keyproxy", "admin", "--config", str(self._config),
            env=clean_environment(self._directory) | {"KEYPROXY_ADMIN__ADDRESS": f"127.0.0.1:{port}"},
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            await until(lambda: _accepts(port), "the admin API listens", seconds=60.0, while_running=process)
            yield process
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def _until_delivered(sql: Any, number: int) -> None:
    delivered = "SELECT count(*) FROM keyproxy.limit_alerts WHERE delivered_at IS NOT NULL"
    async with asyncio.timeout(60):
        while await sql.fetchval(delivered) < number:
            await asyncio.sleep(0.05)


async def test_an_admin_process_that_is_killed_while_sending_is_followed_by_the_same_id(
    spender: Spender, receiver: Receiver, tmp_path: Path, dsn: str, sql: Any
) -> None:
    await spender.spend(window_of(), 85)
    admin = Admin(tmp_path, dsn, receiver)
    sending, never = asyncio.Event(), asyncio.Event()

    async def no_response() -> None:
        sending.set()
        await never.wait()

    receiver.on_request = no_response
    async with admin.running() as first, asyncio.timeout(60):
        await sending.wait()
        os.kill(first.pid, signal.SIGKILL)
        assert await first.wait() == -signal.SIGKILL
    receiver.on_request = None
    never.set()
    await _later(sql)
    async with admin.running():
        await _until_delivered(sql, 1)
    assert len(receiver.got) == 2
    assert len(set(receiver.ids)) == 1


async def test_two_admin_processes_deliver_each_alert_once(
    spender: Spender, receiver: Receiver, tmp_path: Path, dsn: str, sql: Any
) -> None:
    users = [f"u_{number}" for number in range(8)]
    admin = Admin(tmp_path, dsn, receiver)
    async with admin.running(), admin.running():
        for user in users:
            await spender.spend(window_of(user), 85)
        await _until_delivered(sql, len(users))
    assert sorted(one["data"]["pool_id"] for one in receiver.received) == sorted(users)
    assert len(set(receiver.ids)) == len(users)
