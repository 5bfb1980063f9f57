"""The acting user of Django's tasks: enqueued, called, and run by a worker from what a backend stores."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
import threading
from typing import Any

import pytest

pytest.importorskip("django.tasks", reason="django.tasks needs Django 6.0 or later")

from django.tasks import TaskResultStatus
from django.utils.module_loading import import_string

from keyproxy_client.acting import acting, acting_as, request_identity
from keyproxy_client.django.tasks import task
from keyproxy_client.identity import Identity
from project import background
from project.background import fail, own_who, stored_who, stored_who_async, who

ALICE = ["u_alice", "acme", False]
NAMED = {"user": "u_alice", "tenant": "acme", "test": False}


def run(result: Any, **changed: Any) -> Any:
    """Run a stored task as a worker does: another thread that knows its path and its arguments in JSON."""
    stored = json.loads(json.dumps({"path": result.task.module_path, "args": result.args, "kwargs": result.kwargs}))
    found: list[Any] = []

    def work() -> None:
        loaded = import_string(stored["path"])
        context = ["context"] if loaded.takes_context else []
        found.append(loaded.call(*context, *stored["args"], **{**stored["kwargs"], **changed}))
        assert acting() is None

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_a_task_acts_for_the_user_that_enqueued_it() -> None:
    with acting_as("u_alice", "acme"):
        assert who.enqueue().return_value == ALICE
        stored = stored_who.enqueue(1, 2, factor=10)
        stored_async = stored_who_async.enqueue(value=1)
    assert stored.kwargs == {"factor": 10, "_keyproxy": NAMED}
    assert run(stored) == [ALICE, 30]
    assert run(stored_async) == [ALICE, {"value": 1}]
    identity = Identity("u_bob", "globex", frozenset(), True, "key_1")
    with request_identity(identity):
        assert run(stored_who.enqueue()) == [["u_bob", "globex", True], 0]


def test_a_task_that_was_enqueued_without_acting_user_acts_for_none() -> None:
    assert who.enqueue().return_value is None
    stored = stored_who.enqueue()
    with acting_as("u_alice", "acme"):
        assert stored.task.call(*stored.args, **stored.kwargs) == [None, 0]
        assert acting() is not None


def test_a_task_that_is_enqueued_in_a_coroutine_acts_for_its_user() -> None:
    async def lookup() -> Any:
        with acting_as("u_carol") as carol:
            return carol

    async def enqueue() -> tuple[Any, Any, Any]:
        with acting_as("u_alice", "acme"):
            of_block = await stored_who.aenqueue()
        with request_identity(None, lookup=lambda: pytest.fail("in the event loop"), lookup_async=lookup):
            of_request = await stored_who.aenqueue()
        return of_block, of_request, await stored_who_async.aenqueue()

    of_block, of_request, of_none = asyncio.run(enqueue())
    assert run(of_block) == [ALICE, 0]
    assert run(of_request) == [["u_carol", None, False], 0]
    assert run(of_none) == [None, {}]


def test_a_function_that_is_called_acts_for_its_caller() -> None:
    with acting_as("u_alice", "acme"):
        assert who.func() == ALICE
        assert who.call() == ALICE
    assert who.call() is None


def test_no_task_acts_for_the_user_of_an_earlier_one() -> None:
    with acting_as("u_alice", "acme"):
        background.leave_a_block_open.enqueue()
        assert fail.enqueue().status == TaskResultStatus.FAILED
        assert who.enqueue().return_value == ALICE
    background.blocks.clear()
    assert who.enqueue().return_value is None
    assert acting() is None


@pytest.mark.parametrize(
    "invalid",
    [
        "u_alice",
        ["u_alice"],
        {},
        NAMED | {"user": "u_1,u_2"},
        NAMED | {"user": 1},
        NAMED | {"tenant": "a/b"},
        NAMED | {"tenant": 1},
        NAMED | {"test": "yes"},
        NAMED | {"test": None},
    ],
    ids=str,
)
def test_invalid_values_count_as_no_user(invalid: Any) -> None:
    with acting_as("u_alice", "acme"):
        stored = stored_who.enqueue()
    assert run(stored, _keyproxy=invalid) == [None, 0]


def test_a_task_that_is_enqueued_again_acts_for_its_first_user() -> None:
    with acting_as("u_alice", "acme"):
        stored = stored_who.enqueue(7)
    with acting_as("u_bob"):
        again = stored.task.enqueue(*stored.args, **stored.kwargs)
    assert run(again) == [ALICE, 7]


def test_a_task_keeps_what_django_gives_it() -> None:
    assert own_who.priority == 3
    assert isinstance(own_who, background.OwnTask)
    with acting_as("u_alice", "acme"):
        assert own_who.using(priority=5).enqueue().return_value == ALICE
    for one in (who, own_who, stored_who.using(queue_name="default")):
        assert pickle.loads(pickle.dumps(one)) == one
        assert copy.deepcopy(one) == one
    assert who.name == "who"
    assert who.module_path == "project.background.who"


def test_the_keyword_is_reserved_and_hidden_from_the_function() -> None:
    def takes_it(_keyproxy: object) -> None:
        """Would receive the acting user."""

    with pytest.raises(TypeError, match="reserved"):
        task(takes_it)
    with pytest.raises(TypeError, match="run_after"):
        task(run_after=None)
    assert (
        str(inspect.signature(stored_who_async.func)) == "(context: 'Any', *, _keyproxy=None, **values: 'int') -> 'Any'"
    )
