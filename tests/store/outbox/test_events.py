"""The queue of events for webhooks: each is sent at least once under one id, and not after its expiry."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta

import asyncpg
import pytest

from keyproxy.store.outbox.events import APPROVAL_EVENTS, CHANNEL, KEY_EVENTS, EventQueue
from keyproxy.store.outbox.message import Abandoned
from keyproxy.store.postgres.database import Database
from tests.store.approvals.approval_rows import add_owner, approve, claim, decide, new_claim, release
from tests.store.harness import Sql
from tests.waiting import until


@pytest.fixture
def queue(database: Database) -> EventQueue:
    """The queue of events of approvals."""
    return EventQueue(database, APPROVAL_EVENTS)


async def add_event(sql: Sql, kind: str = "approval.requested", *, lasts: str = "1 hour") -> str:
    """Write an event."""
    event: str = await sql.fetchval(f"SELECT keyproxy.note_event($1, '{{\"n\": 1}}', now() + interval '{lasts}')", kind)
    return event


async def test_request_and_each_decision_write_one_event_and_use_and_giving_back_none(
    queue: EventQueue, sql: Sql
) -> None:
    await add_owner(sql)
    approval, value = await approve(sql), new_claim()
    await claim(sql, claim=value)
    await release(sql, value)
    await decide(sql, "denied")
    rows = await sql.fetch("SELECT kind, payload FROM keyproxy.events ORDER BY created_at, id")
    found = [(row["kind"], json.loads(row["payload"])) for row in rows]
    assert [(kind, payload["state"]) for kind, payload in found] == [
        ("approval.requested", "pending"), ("approval.decided", "approved"), ("approval.decided", "denied"),
    ]  # fmt: skip
    first = found[0][1]
    assert {name: value for name, value in first.items() if not name.endswith("_at")} == {
        "approval": approval, "state": "pending", "kind": "human", "tool": "pay", "tenant": "acme", "user": "u_42",
        "key": "key_1", "agent": "crawler", "client": "192.0.2.1",
        "summary": {"tool": "pay", "key_hint": "kp_live_…aaaa"},
    }  # fmt: skip
    assert found[1][1]["decided_by"] == "ann"
    assert await queue.count_waiting() == 3


async def test_request_that_is_rolled_back_leaves_no_event(sql: Sql) -> None:
    await add_owner(sql)
    transaction = sql.transaction()
    await transaction.start()
    await claim(sql)
    await transaction.rollback()
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.events") == 0


async def test_claimed_event_has_its_id_and_content_and_goes_to_one_sender(queue: EventQueue, sql: Sql) -> None:
    events = {await add_event(sql) for _ in range(20)}
    claims = await asyncio.gather(*(queue.claim(5) for _ in range(6)))
    messages = [message for claimed in claims for message in claimed]
    ids = [message.id for message in messages]
    assert len(ids) == len(set(ids)) == 20
    assert set(ids) == events
    content = json.loads(messages[0].content)
    assert (content["type"], content["data"]) == ("approval.requested", {"n": 1})
    assert content["timestamp"].endswith("Z")


async def test_event_of_a_dead_sender_is_sent_again_under_the_same_id(queue: EventQueue, sql: Sql) -> None:
    event = await add_event(sql)
    (first,) = await queue.claim(9, timedelta(seconds=0))
    (again,) = await queue.claim(9)
    assert (first.id, again.id, first.content, again.attempts) == (event, event, again.content, 2)
    assert await queue.claim(9) == []
    # A late report of the first attempt has no effect.
    await queue.failed(first, "late", None)
    await queue.sent(again)
    assert await queue.count_waiting() == 0


async def test_failed_event_is_retried_and_finally_abandoned(queue: EventQueue, sql: Sql) -> None:
    await add_event(sql)
    (message,) = await queue.claim(9)
    await queue.failed(message, "x" * 600, timedelta(0))
    (message,) = await queue.claim(9)
    await queue.failed(message, "gone", None)
    assert await queue.claim(9) == []
    assert await queue.count_waiting() == 0


async def test_expired_event_is_not_sent_and_abandoned(queue: EventQueue, sql: Sql) -> None:
    tried = await add_event(sql)
    (message,) = await queue.claim(9, timedelta(0))
    await queue.failed(message, "refused", timedelta(0))
    await add_event(sql)
    await sql.execute("UPDATE keyproxy.events SET expires_at = now()")
    assert await queue.claim(9) == []
    assert await queue.prepare() == [
        Abandoned(f"event {tried} (approval.requested)", "expired; refused", "approval.requested"),
        Abandoned("1 events (approval.requested)", "expired before an attempt", "approval.requested"),
    ]
    assert await queue.prepare() == []


async def test_queues_of_different_kinds_are_separate(queue: EventQueue, database: Database, sql: Sql) -> None:
    await add_event(sql, "key.anomaly")
    assert await queue.claim(9) == []
    assert len(await EventQueue(database, KEY_EVENTS).claim(9)) == 1


async def test_new_event_notifies_its_sender(dsn: str, sql: Sql) -> None:
    notified = asyncio.Event()
    listening: Sql = await asyncpg.connect(dsn)
    await listening.add_listener(CHANNEL, lambda *_: notified.set())
    await add_event(sql)
    await until(notified.is_set, "the notification arrives")
    await listening.close()


@pytest.mark.parametrize("kind", ["", "approval", "approval.", ".x", "Approval.x", "a.b.c", "a" * 33 + ".x"])
async def test_kind_of_an_event_is_two_words(sql: Sql, kind: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await add_event(sql, kind)
