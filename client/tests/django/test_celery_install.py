"""Installing the hooks, tasks that run in place, publishing from coroutines, and what the hooks cost."""

from __future__ import annotations

import asyncio
import contextvars
import timeit
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain, chord, group, signals
from celery.app.task import Context
from celery.exceptions import ImproperlyConfigured

from keyproxy_client import celery as keyproxy_celery
from keyproxy_client.acting import acting, acting_as, request_identity
from keyproxy_client.identity import Identity

ALICE = ["u_alice", "acme", False]
BOB = {"keyproxy_user": "u_bob", "keyproxy_tenant": "globex", "keyproxy_test": True}
FOR_BOB = ["u_bob", "globex", True]


def new_app(**configuration: Any) -> Celery:
    return Celery("installing", broker="memory://", backend="cache+memory://", set_as_current=False, **configuration)


@pytest.fixture(scope="module")
def eager() -> Iterator[SimpleNamespace]:
    """Tasks of an app that runs them in place."""
    app = new_app()
    app.conf.task_always_eager = True
    keyproxy_celery.install(app)

    def report(*_: object) -> list[Any] | None:
        found = acting()
        return None if found is None else [found.user, found.tenant, found.is_test]

    def leave_a_block_open(blocks: list[Any]) -> None:
        blocks.append(acting_as("u_leaked"))
        blocks[-1].__enter__()

    def fail() -> None:
        raise ValueError

    def retry(self: Any) -> list[Any] | None:
        if not self.request.retries:
            with acting_as("u_block"):
                self.retry(countdown=0)
        return report()

    def append(earlier: list[Any]) -> list[Any]:
        return [*earlier, report()]

    make = app.task
    yield SimpleNamespace(
        who=make(report, name="who"),
        leave_a_block_open=make(leave_a_block_open, name="leave_a_block_open", serializer="pickle"),
        fail=make(fail, name="fail"),
        retry=make(retry, name="retry", bind=True),
        append=make(append, name="append"),
    )
    app.close()


@pytest.mark.parametrize("configure", ["constructor", "conf", "update", "object", "namespace", "class", "read"])
def test_task_protocol_1_is_refused(configure: str) -> None:
    app = new_app(**({"task_protocol": 1} if configure == "constructor" else {}))
    if configure == "conf":
        app.conf.task_protocol = 1
    elif configure == "update":
        app.conf.update(task_protocol=1)
    elif configure == "object":
        app.config_from_object({"task_protocol": 1})
    elif configure == "namespace":
        app.config_from_object({"CELERY_TASK_PROTOCOL": 1}, namespace="CELERY")
    elif configure == "class":
        app.config_from_object(SimpleNamespace(task_protocol=1))
    elif configure == "read":
        assert app.conf.task_protocol == 2
        app.conf.task_protocol = 1
    with pytest.raises(ImproperlyConfigured, match="protocol 2"):
        keyproxy_celery.install(app)


def test_installing_twice_and_for_two_apps_connects_each_hook_once() -> None:
    keyproxy_celery.install(new_app())
    before = [len(one.receivers) for one in (signals.before_task_publish, signals.task_prerun, signals.task_postrun)]
    app = new_app()
    for _ in range(3):
        keyproxy_celery.install(app)
    after = [len(one.receivers) for one in (signals.before_task_publish, signals.task_prerun, signals.task_postrun)]
    assert after == before


def test_installing_leaves_the_configuration_to_the_module_that_makes_the_app() -> None:
    app = new_app()
    keyproxy_celery.install(app)
    assert not app.configured
    configured: list[object] = []
    app.on_after_configure.connect(lambda sender, **_: configured.append(sender), weak=False)
    app.conf.task_default_queue = "elsewhere"
    assert app.conf.task_default_queue == "elsewhere"
    assert configured == [app]


def test_a_task_in_place_acts_for_its_caller_or_as_its_headers_name(eager: SimpleNamespace) -> None:
    who = eager.who
    assert who.delay().get() is None
    assert who.apply_async(headers=BOB).get() == FOR_BOB
    with acting_as("u_alice", "acme"):
        assert who.delay().get() == ALICE
        assert who.apply().get() == ALICE
        assert who.apply_async(headers=BOB).get() == FOR_BOB
        assert who.apply_async(headers={"keyproxy_user": "u_bob"}).get() == ["u_bob", "acme", False]
        assert who.apply_async(headers={"keyproxy_test": True}).get() == ["u_alice", "acme", True]
        assert who.apply_async(headers={"other": "value"}).get() == ALICE
        assert eager.retry.delay().get() == ALICE
        assert eager.retry.apply_async(headers=BOB).get() == FOR_BOB
        assert chain(eager.append.s([]), eager.append.s()).apply_async().get() == [ALICE] * 2
        assert group(who.s(), who.s().set(headers=BOB)).apply_async().get() == [ALICE, FOR_BOB]
        assert chord([who.s(), who.s().set(headers=BOB)], eager.append.s()).apply_async().get() == [
            ALICE,
            FOR_BOB,
            ALICE,
        ]


def test_a_task_in_place_leaves_its_callers_acting_user_as_it_was(eager: SimpleNamespace) -> None:
    blocks: list[Any] = []
    with acting_as("u_alice", "acme") as alice:
        for headers in (None, BOB):
            eager.leave_a_block_open.apply((blocks,), headers=headers)
            assert acting() is alice
            with pytest.raises(ValueError, match=r"^$"):
                eager.fail.apply_async(headers=headers).get()
            assert acting() is alice
        blocks.clear()
        assert acting() is alice
    assert acting() is None


def test_a_task_in_place_does_not_look_the_user_of_a_request_up(eager: SimpleNamespace) -> None:
    def fail() -> None:
        raise AssertionError

    with request_identity(None, lookup=fail):
        assert eager.leave_a_block_open.apply(([],)).get() is None


def test_a_task_of_a_request_acts_for_its_identity() -> None:
    sent: list[dict[str, Any]] = []

    def note(headers: dict[str, Any], **_: object) -> None:
        sent.append({name: value for name, value in headers.items() if name.startswith("keyproxy_")})

    app = new_app()
    app.conf.task_default_queue = "nobody_consumes"
    keyproxy_celery.install(app)
    identity = Identity("u_alice", "acme", frozenset({"jobs:write"}), True, "key_1", actor="u_service")
    signals.after_task_publish.connect(note)
    try:
        with request_identity(identity):
            app.send_task("remote")
        with request_identity(None):
            app.send_task("remote")
        asyncio.run(_publish_together(app, 20))
    finally:
        signals.after_task_publish.disconnect(note)
        app.close()
    assert sent[:2] == [{"keyproxy_user": "u_alice", "keyproxy_tenant": "acme", "keyproxy_test": True}, {}]
    assert [one["keyproxy_user"] for one in sent[2:]] == [f"u_{number}" for number in [*range(20), *range(20)]]


async def _publish_together(app: Celery, count: int) -> None:
    """Publish from coroutines that alternate, in the loop's thread and in others."""

    async def publish(number: int) -> None:
        with request_identity(Identity(f"u_{number}", "acme", frozenset(), False, "key_1")):
            await asyncio.sleep(0)
            app.send_task("remote")
            await barrier.wait()
            async with turn:
                await turn.wait_for(lambda: next_one[0] == number)
                await asyncio.to_thread(app.send_task, "remote")
                next_one[0] += 1
                turn.notify_all()

    barrier, turn, next_one = asyncio.Barrier(count), asyncio.Condition(), [0]
    await asyncio.gather(*(publish(number) for number in range(count)))


def test_a_time_limit_that_interrupts_a_hook_makes_no_later_task_act_for_the_earlier_user(
    eager: SimpleNamespace,
) -> None:
    # A worker's own context: what an interrupted hook leaves behind must not reach later tests.
    contextvars.copy_context().run(_interrupt_hooks, eager.who)


def _interrupt_hooks(task: Any) -> None:
    def enter(task_id: str, **headers: Any) -> None:
        task.request_stack.push(Context(headers, id=task_id))
        keyproxy_celery._enter(task_id=task_id, task=task)

    def leave(task_id: str) -> None:
        keyproxy_celery._leave(task_id=task_id)
        task.request_stack.pop()

    enter("first", keyproxy_user="u_alice")
    task.request_stack.pop()  # its _leave was interrupted
    enter("second")
    assert acting() is None
    leave("second")
    assert acting() is None
    task.request_stack.push(Context(id="third"))  # its _enter was interrupted
    leave("third")
    assert acting() is None


@pytest.mark.once
def test_each_hook_takes_at_most_5_microseconds(eager: SimpleNamespace) -> None:
    def microseconds(hook: Any) -> float:
        count = 100
        return min(timeit.repeat(hook, number=count, repeat=200)) / count * 1e6

    plain = {"id": "1", "task": "who", "retries": 0, "lang": "py", "root_id": "1", "parent_id": None}
    body: tuple[Any, ...] = ((), {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
    with acting_as("u_alice", "acme"):
        assert microseconds(lambda: keyproxy_celery._add_headers(dict(plain), body)) <= 5
        step = {"task": "who", "args": [], "kwargs": {}, "options": {}}
        nested = {"chain": [step | {"options": {"chord": step}}, step], "chord": step}
        assert microseconds(lambda: keyproxy_celery._add_headers(plain | BOB, ((), {}, dict(nested)))) <= 5
    eager.who.request_stack.push(Context(plain | BOB, args=(), kwargs={}, is_eager=False))

    def run() -> None:
        keyproxy_celery._enter(task_id="1", task=eager.who)
        keyproxy_celery._leave(task_id="1")

    try:
        assert microseconds(run) <= 10
    finally:
        eager.who.request_stack.pop()
