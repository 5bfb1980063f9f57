"""The acting user of tasks: each way to publish a task, with a worker of threads."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import celery
import psycopg
import pytest
from celery import chain, chord, group
from celery.app.trace import build_tracer
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ChordError
from celery.result import AsyncResult
from celery.worker import state

import celery_project as project
from celery_project import app, append, begin, fail, headers, note_failure, note_id, spawn, who
from deployment import Deployment
from keyproxy_client.acting import acting, acting_as

ALICE = ["u_alice", "acme", False]
BOB = {"keyproxy_user": "u_bob", "keyproxy_tenant": "globex", "keyproxy_test": True}
FOR_BOB = ["u_bob", "globex", True]


@pytest.fixture(scope="module", autouse=True)
def worker() -> Iterator[None]:
    stopping = threading.Event()

    def wake() -> None:
        # The worker looks for its end once a second, or after a message.
        while not stopping.wait(0.02):
            who.delay()

    level = logging.getLogger().level
    with start_worker(app, pool="threads", concurrency=2, perform_ping_check=False, loglevel="CRITICAL"):
        yield
        waking = threading.Thread(target=wake)
        waking.start()
    stopping.set()
    waking.join()
    # The worker sets the level of all loggers.
    logging.getLogger().setLevel(level)


def result(published: AsyncResult) -> Any:
    return published.get(timeout=10, interval=0.002)


def published_by_alice(publish: Callable[[], AsyncResult]) -> Any:
    with acting_as("u_alice", "acme"):
        published = publish()
    return result(published)


def test_a_task_acts_for_the_user_that_published_it_and_without_one_for_none() -> None:
    assert published_by_alice(who.delay) == ALICE
    assert result(who.delay()) is None
    with acting_as("u_alice", test=True):
        published = who.delay()
    assert result(published) == ["u_alice", None, True]


def test_the_message_names_the_acting_user_and_nothing_else() -> None:
    assert published_by_alice(headers.delay) == {
        "keyproxy_user": "u_alice",
        "keyproxy_tenant": "acme",
        "keyproxy_test": False,
    }
    assert result(headers.delay()) == {}


@pytest.mark.parametrize(
    ("publish", "expected"),
    [
        pytest.param(lambda: who.apply_async(countdown=0.01), ALICE, id="countdown"),
        pytest.param(lambda: app.send_task("celery_project.who"), ALICE, id="send_task"),
        pytest.param(lambda: chain(begin.s(), append.s(), append.s()).delay(), [ALICE] * 3, id="chain"),
        pytest.param(lambda: group(who.s(), who.s()).delay(), [ALICE] * 2, id="group"),
        pytest.param(lambda: chord([who.s(), who.s()], append.s()).delay(), [ALICE] * 3, id="chord"),
        pytest.param(lambda: chord([], append.s()).delay(), [ALICE], id="chord-without-header"),
        pytest.param(
            lambda: chain(begin.s(), group(who.s(), who.s()), append.s(), append.s()).delay(),
            [ALICE] * 4,
            id="chord-in-chain",
        ),
        pytest.param(
            lambda: chord([chord([who.s()], who.s()), who.s()], chain(append.s(), append.s())).delay(),
            [ALICE] * 4,
            id="chord-of-chords",
        ),
        pytest.param(lambda: who.chunks([(), ()], 1).delay(), [[ALICE], [ALICE]], id="chunks"),
        pytest.param(lambda: who.map([1, 2]).delay(), [ALICE] * 2, id="map"),
        pytest.param(lambda: project.retry.delay({}), ALICE, id="retry"),
        pytest.param(lambda: project.replaced.delay(), ALICE, id="replace"),
        pytest.param(lambda: project.call_in_place.delay({}), [["u_block", None, False]] * 2, id="eager-in-task"),
        pytest.param(lambda: project.in_a_thread.delay(), [None], id="new-thread-in-task"),
    ],
)
def test_every_way_to_publish_a_task_carries_the_callers_user(
    publish: Callable[[], AsyncResult], expected: list[Any]
) -> None:
    assert published_by_alice(publish) == expected


def test_callbacks_act_for_the_user_of_their_task() -> None:
    for count in (1, 2):
        callbacks = [project.note.si(f"link {number} of {count}") for number in range(count)]
        ids = [callback.freeze().id for callback in callbacks]
        with acting_as("u_alice", "acme"):
            who.apply_async(link=callbacks)
        for id_ in ids:
            result(AsyncResult(id_, app=app))
        assert [project.noted(f"link {number} of {count}") for number in range(count)] == [[ALICE]] * count


def test_child_tasks_act_for_the_user_of_their_task_or_of_the_block_around_them() -> None:
    assert result(AsyncResult(published_by_alice(spawn.delay), app=app)) == ALICE
    child = published_by_alice(lambda: spawn.delay("u_block"))
    assert result(AsyncResult(child, app=app)) == ["u_block", None, False]
    assert result(AsyncResult(result(spawn.delay()), app=app)) is None


@pytest.mark.parametrize(
    ("publish", "expected"),
    [
        pytest.param(lambda: who.apply_async(headers=BOB), FOR_BOB, id="apply_async"),
        pytest.param(lambda: who.s().set(headers=BOB).delay(), FOR_BOB, id="signature"),
        pytest.param(
            lambda: chain(begin.s().set(headers=BOB), append.s()).delay(), [FOR_BOB, FOR_BOB], id="first-of-chain"
        ),
        pytest.param(
            lambda: chain(begin.s(), append.s().set(headers=BOB)).delay(), [ALICE, FOR_BOB], id="last-of-chain"
        ),
        pytest.param(lambda: group(who.s(), who.s()).apply_async(headers=BOB), [FOR_BOB] * 2, id="group"),
        pytest.param(lambda: group(who.s().set(headers=BOB), who.s()).delay(), [FOR_BOB, ALICE], id="one-of-group"),
        pytest.param(lambda: chord([who.s(), who.s()], append.s()).apply_async(headers=BOB), [FOR_BOB] * 3, id="chord"),
        pytest.param(
            lambda: chord([who.s(), who.s()], append.s().set(headers=BOB)).delay(),
            [ALICE, ALICE, FOR_BOB],
            id="chord-body",
        ),
        pytest.param(lambda: project.retry.delay({"headers": BOB}), FOR_BOB, id="retry"),
        pytest.param(lambda: project.call_in_place.delay({"headers": BOB}), [FOR_BOB, ["u_block", None, False]]),
    ],
)
def test_headers_of_the_publisher_win(publish: Callable[[], AsyncResult], expected: list[Any]) -> None:
    assert published_by_alice(publish) == expected


def test_headers_of_the_publisher_name_a_user_where_there_is_none() -> None:
    assert result(who.apply_async(headers=BOB)) == FOR_BOB
    assert result(who.apply_async(headers={"keyproxy_user": "u_bob"})) == ["u_bob", None, False]


def test_a_header_that_the_publisher_did_not_set_is_the_callers() -> None:
    def published(**chosen: object) -> Any:
        return published_by_alice(lambda: who.apply_async(headers=chosen))

    assert published(keyproxy_user="u_bob") == ["u_bob", "acme", False]
    assert published(keyproxy_test=True) == ["u_alice", "acme", True]
    assert published(other="value") == ALICE
    assert published(keyproxy_user="") is None


@pytest.mark.parametrize("header_tasks", [[BOB, BOB], [BOB, None], [None, BOB]])
def test_the_body_of_a_chord_acts_for_its_publisher_whichever_header_task_ends_last(
    header_tasks: list[dict[str, Any] | None],
) -> None:
    body = append.s()
    header = [who.s().set(headers=named) if named else who.s() for named in header_tasks]
    expected = [FOR_BOB if named else ALICE for named in header_tasks]
    assert published_by_alice(lambda: chord(header, body).delay()) == [*expected, ALICE]
    # The signature itself names no user.
    assert result(chord(header, body).delay()) == [*(FOR_BOB if named else None for named in header_tasks), None]


def test_a_retry_acts_for_the_user_of_the_task_whatever_surrounds_it() -> None:
    assert published_by_alice(lambda: project.retry.delay({}, "u_block")) == ALICE
    assert published_by_alice(lambda: project.retry.delay({"headers": {"attempt": "2"}}, "u_block")) == ALICE
    assert result(project.retry.delay({}, "u_block")) is None


def test_errbacks_act_for_the_user_of_the_failed_task() -> None:
    published_errback = note_id.s()
    published_id = published_errback.freeze().id
    with acting_as("u_alice", "acme"):
        failed = fail.apply_async(link_error=[note_failure.s(), published_errback])
    assert result(AsyncResult(published_id, app=app)) == ALICE
    assert project.noted(failed.id) == [ALICE]
    with acting_as("u_alice", "acme"):
        failed = chord([who.s(), fail.s()], append.s().on_error(note_failure.s())).delay()
    with pytest.raises((ChordError, ValueError)):
        result(failed)
    assert project.noted(failed.id) == [ALICE]


def test_no_task_acts_for_the_user_of_an_earlier_one() -> None:
    for first in (
        who.s(),
        fail.s(),
        project.retry.s({}),
        project.replaced.s(),
        project.leave_blocks_open.s("u_leaked"),
    ):
        with acting_as("u_alice", "acme"):
            published = [first.delay() for _ in range(4)]
        published += [who.delay() for _ in range(4)]
        assert [result(later) for later in published[4:]] == [None] * 4


def test_a_block_that_an_earlier_task_left_open_changes_no_later_task_when_it_ends() -> None:
    published_by_alice(lambda: project.leave_blocks_open.delay("u_leaked"))
    assert published_by_alice(project.end_blocks_of_earlier_tasks.delay) == [ALICE, ALICE]
    published_by_alice(lambda: project.leave_blocks_open.delay("u_leaked"))
    assert result(project.end_blocks_of_earlier_tasks.delay()) == [None, None]
    assert result(who.delay()) is None


@pytest.mark.parametrize(
    "invalid",
    [
        {"keyproxy_user": "u_1,u_2"},
        {"keyproxy_user": " "},
        {"keyproxy_user": 42},
        {"keyproxy_user": ["u_bob"]},
        {"keyproxy_user": None},
        {"keyproxy_user": "u_bob\r\nX: y"},
        {"keyproxy_user": "u" * 129},
        {"keyproxy_tenant": "../acme"},
        {"keyproxy_tenant": ""},
        {"keyproxy_tenant": 1},
        {"keyproxy_test": "yes"},
        {"keyproxy_test": 1},
        {"keyproxy_test": None},
        {"keyproxy_test": [True]},
    ],
    ids=str,
)
def test_invalid_values_in_a_message_count_as_no_user(invalid: dict[str, Any]) -> None:
    assert published_by_alice(lambda: who.apply_async(headers=BOB | invalid)) is None
    with acting_as("u_alice", "acme"):
        assert who.apply(headers=BOB | invalid).get() is None
        assert acting() is not None


def test_the_mode_may_be_spelled_as_in_http_headers() -> None:
    for spelling, is_test in (("true", True), ("false", False), (True, True), (False, False)):
        assert result(who.apply_async(headers=BOB | {"keyproxy_test": spelling})) == ["u_bob", "globex", is_test]


def test_a_task_calls_keyproxy_with_the_service_key_in_the_name_of_its_user(deployment: Deployment) -> None:
    users = [(f"u_{secrets.token_hex(6)}", tenant) for tenant in ("acme", "globex", "acme")]
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        for user, tenant in users:
            superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, %s)", [user, tenant])
    call = project.call.s(deployment.origin, deployment.service_key_pattern, deployment.service_test_key_pattern)
    published = []
    for user, tenant in users:
        for is_test in (False, True):
            with acting_as(user, tenant, is_test):
                published.append(call.delay())
    expected = [
        [user, tenant, str(is_test).lower(), f"u_service_{tenant}", None]
        for user, tenant in users
        for is_test in (False, True)
    ]
    assert [result(one) for one in published] == expected
    assert result(call.delay()) == ["NoActingUser"]


def test_callbacks_of_a_task_that_is_delivered_again_after_its_end_act_for_none() -> None:
    with acting_as("u_alice", "acme"):
        finished = who.delay()
    result(finished)
    callback = who.s()
    later = callback.freeze()
    message = {"id": finished.id, "delivery_info": {"redelivered": True}, "callbacks": [callback], **BOB}
    state.successful_requests.discard(finished.id)  # as in another process than the first delivery's
    build_tracer(who.name, who, app=app)(finished.id, (), {}, message)
    if celery.VERSION >= (5, 7):  # earlier versions do not publish them
        assert result(later) is None
    assert acting() is None
