"""Webhooks of approvals and of keys: prompt, signed, to a receiver each, and retried under one id until they expire."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from keyproxy.admin.webhook_sender import Outcome
from keyproxy.admin.webhooks import Webhooks
from keyproxy.config.schema import Settings
from keyproxy.config.tools.anomaly_settings import AnomalySettings
from keyproxy.config.tools.tool_settings import ApprovalSettings
from keyproxy.store.postgres.database import Database
from tests.acceptance.conftest import Configure, administering
from tests.acceptance.conftest import commands as commands
from tests.acceptance.conftest import configure as configure
from tests.admin.conftest import serving
from tests.rawhttp import free_port
from tests.waiting import until
from tests.webhook_receiver import SECRET, Receiver, receiving, right_signature

#: The promise: the first attempt follows the commit within this time.
PROMPT_SECONDS = 2.0

Note = Callable[..., Any]


@pytest.fixture
def note(sql: Any) -> Note:
    """`await note("approval.requested", number=1)`: insert an event, as triggers and functions do. Returns its id."""

    async def noting(kind: str, *, within: str = "15 minutes", **payload: Any) -> Any:
        return await sql.fetchval(
            "SELECT keyproxy.note_event($1, $2::text::jsonb, now() + $3::text::interval)",
            kind, json.dumps(payload), within,
        )  # fmt: skip

    return noting


@pytest.fixture
async def other() -> AsyncIterator[Receiver]:
    """A second receiver."""
    async with receiving() as receiver:
        yield receiver


def settings_for(receiver: Receiver, other: Receiver | None = None) -> Settings:
    """The first receives events of approvals; the other one, if any, those of keys."""
    anomalies = AnomalySettings() if other is None else AnomalySettings(webhook_url=other.url, webhook_secret=SECRET)
    return Settings(approvals=ApprovalSettings(webhook_url=receiver.url, webhook_secret=SECRET), anomalies=anomalies)


@contextlib.asynccontextmanager
async def sending(database: Database, settings: Settings) -> AsyncIterator[Webhooks]:
    """The webhooks of an admin process, at work while the context lasts."""
    webhooks = Webhooks(database, lambda: settings)
    task = asyncio.create_task(webhooks.run())
    try:
        yield webhooks
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_event_is_signed_and_has_the_payload_of_its_row(
    database: Database, note: Note, receiver: Receiver
) -> None:
    event_id = await note("approval.requested", approval="apr_1", tool="call_partner")
    settings = settings_for(receiver)
    assert await Webhooks(database, lambda: settings).approvals.turn(settings.approvals) == Outcome(sent=1)
    ((headers, body),) = receiver.got
    assert headers["Webhook-Id"] == event_id
    assert event_id.startswith("evt_")
    assert headers["Webhook-Signature"] == right_signature(headers, body)
    content = json.loads(body)
    assert content.pop("timestamp").endswith("Z")
    assert content == {"type": "approval.requested", "data": {"approval": "apr_1", "tool": "call_partner"}}


async def test_a_running_admin_process_attempts_an_event_within_two_seconds(
    configure: Configure, dsn: str, note: Note, receiver: Receiver
) -> None:
    received = asyncio.Event()

    async def arrive() -> None:
        received.set()

    receiver.on_request = arrive
    port = free_port()
    approvals = {"webhook_url": receiver.url, "webhook_secret": SECRET}
    site = configure(dsn, approvals=approvals, admin={"address": f"127.0.0.1:{port}"})
    async with administering(site, port):
        for number in range(3):
            received.clear()
            await note("approval.decided", number=number)
            async with asyncio.timeout(PROMPT_SECONDS):
                await received.wait()
    assert [one["data"] for one in receiver.received] == [{"number": number} for number in range(3)]


async def test_a_receiver_that_does_not_respond_delays_no_first_attempt(
    database: Database, note: Note, receiver: Receiver
) -> None:
    silence, arrivals = asyncio.Event(), asyncio.Queue[float]()

    async def arrive() -> None:
        arrivals.put_nowait(time.monotonic())
        await silence.wait()

    receiver.on_request = arrive
    async with sending(database, settings_for(receiver)):
        for number in range(4):
            noted = time.monotonic()
            await note("approval.requested", number=number)
            async with asyncio.timeout(2 * PROMPT_SECONDS):
                assert await arrivals.get() - noted < PROMPT_SECONDS
        silence.set()
        await until(lambda: len(receiver.got) == 4, "all are received once")
    assert len(set(receiver.ids)) == 4


async def test_neither_a_burst_nor_retries_delay_first_attempts(
    database: Database, note: Note, receiver: Receiver, sql: Any
) -> None:
    """The receiver fails, so that each event is attempted once, and those before it are due for a retry."""
    receiver.statuses = [500] * 10_000
    await sql.execute(
        "INSERT INTO keyproxy.events (kind, payload, expires_at, next_at, attempts)"
        " SELECT 'approval.requested', '{}', now() + interval '1 hour', now() - interval '1 hour', 1"
        " FROM generate_series(1, 500)"
    )
    await sql.execute(
        "INSERT INTO keyproxy.events (kind, payload, expires_at)"
        " SELECT 'approval.requested', jsonb_build_object('new', n), now() + interval '1 hour'"
        " FROM generate_series(1, 100) AS n"
    )
    began = time.monotonic()
    async with sending(database, settings_for(receiver)):
        await until(lambda: sum("new" in one["data"] for one in receiver.received) == 100, "each is attempted")
        assert time.monotonic() - began < PROMPT_SECONDS


async def test_each_webhook_gets_its_own_events_and_an_unset_one_leaves_them(
    database: Database, note: Note, receiver: Receiver, other: Receiver, sql: Any
) -> None:
    kinds = ("approval.requested", "approval.decided", "key.anomaly", "key.suspended")
    for kind in kinds:
        await note(kind)
    left = "SELECT count(*) FROM keyproxy.events WHERE sent_at IS NULL"

    async def are_left(number: int) -> bool:
        return bool(await sql.fetchval(left) == number)

    async with sending(database, settings_for(receiver)):
        await until(lambda: are_left(2), "the events of approvals are received")
    assert {one["type"] for one in receiver.received} == set(kinds[:2])
    async with sending(database, settings_for(receiver, other)):
        await until(lambda: are_left(0), "the events of keys are received")
    assert {one["type"] for one in other.received} == set(kinds[2:])
    assert len(receiver.got) == 2


async def test_a_failed_event_is_retried_under_its_id_and_abandoned_once_it_has_expired(
    database: Database, note: Note, receiver: Receiver, sql: Any, caplog: pytest.LogCaptureFixture
) -> None:
    event_id = await note("approval.requested")
    settings = settings_for(receiver)
    webhooks = Webhooks(database, lambda: settings)
    receiver.statuses = [500, 503, 200, 500]
    for outcome in (Outcome(failed=1), Outcome(failed=1), Outcome(sent=1), Outcome()):
        assert await webhooks.approvals.turn(settings.approvals) == outcome
        await sql.execute("UPDATE keyproxy.events SET next_at = now()")
    assert receiver.ids == [event_id] * 3
    expired = await note("approval.decided")
    assert await webhooks.approvals.turn(settings.approvals) == Outcome(failed=1)
    await sql.execute("UPDATE keyproxy.events SET next_at = now(), expires_at = now() WHERE id = $1", expired)
    assert await webhooks.approvals.turn(settings.approvals) == Outcome(given_up=1)
    assert f"event {expired} (approval.decided) abandoned: expired" in caplog.text
    assert {key: count for key, count in webhooks.results.items() if count} == {
        ("approval.requested", "sent"): 1,
        ("approval.requested", "failed"): 2,
        ("approval.decided", "failed"): 1,
        ("approval.decided", "given_up"): 1,
    }


async def test_two_admin_processes_send_each_event_once(database: Database, note: Note, receiver: Receiver) -> None:
    settings = settings_for(receiver)
    async with sending(database, settings), sending(database, settings):
        noted = [await note("approval.requested", number=number) for number in range(30)]
        await until(lambda: len(receiver.got) >= 30, "all are received")
    assert sorted(receiver.ids) == sorted(noted)


async def test_the_events_of_one_webhook_are_not_signed_with_the_secret_of_another(
    database: Database, note: Note, receiver: Receiver, other: Receiver
) -> None:
    await note("approval.requested")
    await note("key.anomaly")
    secret = "whsec_" + base64.b64encode(b"another key of thirty-two bytes!").decode()
    settings = Settings(
        approvals=ApprovalSettings(webhook_url=receiver.url, webhook_secret=secret),
        anomalies=AnomalySettings(webhook_url=other.url, webhook_secret=SECRET),
    )
    async with sending(database, settings):
        await until(lambda: bool(receiver.got and other.got), "both are received")
    ((headers, body),) = other.got
    assert headers["Webhook-Signature"] == right_signature(headers, body)
    ((headers, body),) = receiver.got
    assert headers["Webhook-Signature"] != right_signature(headers, body)


async def test_the_metrics_of_the_admin_api_count_deliveries_by_kind_and_result(
    database: Database, note: Note, receiver: Receiver
) -> None:
    settings = settings_for(receiver)
    webhooks = Webhooks(database, lambda: settings)
    async with serving(database, webhooks=webhooks) as api:
        await note("approval.requested")
        await webhooks.approvals.turn(settings.approvals)
        page = (await api.call("GET", "/metrics")).body.decode()
    assert 'keyproxy_webhook_deliveries_total{kind="approval.requested",result="sent"} 1.0' in page
    assert 'keyproxy_webhook_deliveries_total{kind="key.suspended",result="sent"} 0.0' in page
