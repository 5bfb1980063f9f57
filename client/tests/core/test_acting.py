"""The acting user: where it comes from, and where it ends."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator

import pytest

from keyproxy_client.acting import Acting, acting, acting_as, acting_async, request_identity, task_scope
from keyproxy_client.identity import Identity

IDENTITY = Identity("u_request", "acme", frozenset(), True, "key_1")


def user() -> str | None:
    """The id of the acting user."""
    found = acting()
    return None if found is None else found.user


def test_no_context_has_no_acting_user() -> None:
    assert acting() is None


def test_block_acts_for_its_user_and_ends() -> None:
    with acting_as("u_1", "acme", test=True) as chosen:
        assert acting() == chosen == Acting("u_1", "acme", True)
        with acting_as("u_2"):
            assert acting() == Acting("u_2")
        assert user() == "u_1"
    assert acting() is None


def test_block_ends_by_an_exception_too() -> None:
    with pytest.raises(KeyError), acting_as("u_1"):
        raise KeyError
    assert acting() is None


def test_order_is_acting_as_then_task_then_request_identity_then_request_user() -> None:
    def lookup() -> Acting:
        return Acting("u_session")

    with request_identity(None, lookup):
        assert user() == "u_session"
        with request_identity(IDENTITY, lookup):
            assert acting() == Acting("u_request", "acme", True)
            with task_scope(Acting("u_task")):
                assert user() == "u_task"
                with acting_as("u_explicit"):
                    assert user() == "u_explicit"
                assert user() == "u_task"
            assert user() == "u_request"
        assert user() == "u_session"
    assert user() is None


@pytest.mark.parametrize("task_user", [None, Acting("u_task")])
def test_task_hides_all_that_surrounds_it(task_user: Acting | None) -> None:
    with request_identity(IDENTITY), acting_as("u_outer"):
        with task_scope(task_user):
            assert acting() == task_user
        assert user() == "u_outer"


def test_request_hides_what_an_earlier_request_of_its_thread_left() -> None:
    left = acting_as("u_earlier")
    with request_identity(IDENTITY):
        left.__enter__()
        assert user() == "u_earlier"
    assert acting() is None
    outside = acting_as("u_outside")
    outside.__enter__()
    with request_identity(IDENTITY):
        assert user() == "u_request"
    with request_identity(None):
        assert acting() is None
    assert user() == "u_outside"
    outside.__exit__(None, None, None)
    left.__exit__(None, None, None)
    assert acting() is None


def test_block_around_the_parts_of_a_body_applies_to_all_of_them_and_to_nothing_between() -> None:
    def parts() -> Iterator[str | None]:
        yield user()
        with acting_as("u_block"):
            yield user()
            yield user()
        yield user()

    body, context, found = parts(), request_identity(IDENTITY), []
    for _ in range(4):
        with context:
            found.append(next(body))
        assert acting() is None
    assert found == ["u_request", "u_block", "u_block", "u_request"]


def test_user_of_a_request_is_looked_up_only_when_it_is_needed() -> None:
    lookups = []

    def lookup() -> None:
        lookups.append(1)

    with request_identity(None, lookup):
        assert not lookups
        assert acting() is None
    with request_identity(IDENTITY, lookup):
        assert user() == "u_request"
    assert lookups == [1]


def test_coroutine_awaits_the_lookup_of_the_user() -> None:
    async def lookup() -> Acting:
        await asyncio.sleep(0)
        return Acting("u_async")

    async def run() -> list[str | None]:
        found = []
        with request_identity(None, lambda: Acting("u_blocking"), lookup):
            found.append(await acting_async())
            with acting_as("u_explicit"):
                found.append(await acting_async())
        with request_identity(IDENTITY, None, lookup):
            found.append(await acting_async())
        return [one.user if one else None for one in found]

    assert asyncio.run(run()) == ["u_async", "u_explicit", "u_request"]


def test_new_thread_starts_empty() -> None:
    found: list[Acting | None] = []
    with acting_as("u_1"), request_identity(IDENTITY):
        thread = threading.Thread(target=lambda: found.append(acting()))
        thread.start()
        thread.join()
    assert found == [None]


def test_concurrent_tasks_keep_their_users_apart() -> None:
    async def act(name: str) -> bool:
        with acting_as(name):
            for _ in range(20):
                await asyncio.sleep(0)
                if user() != name:
                    return False
        return user() is None

    async def run() -> list[bool]:
        return await asyncio.gather(*(act(f"u_{number}") for number in range(20)))

    assert all(asyncio.run(run()))


def test_thread_of_a_coroutine_acts_for_the_same_user() -> None:
    async def run() -> str | None:
        with acting_as("u_1"):
            return await asyncio.to_thread(user)

    assert asyncio.run(run()) == "u_1"


def test_context_of_a_request_does_not_outlive_it() -> None:
    context = contextvars.copy_context()

    def serve() -> None:
        with request_identity(IDENTITY):
            assert user() == "u_request"

    context.run(serve)
    assert context.run(user) is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Acting(""),
        lambda: Acting("u_1,u_2"),
        lambda: Acting("u_1\r\nX-Other: 1"),
        lambda: Acting("u 1"),
        lambda: Acting("u_" + "1" * 127),
        lambda: Acting("_u"),
        lambda: Acting("ü"),
        lambda: Acting("u_1", ""),
        lambda: Acting("u_1", "../etc"),
        lambda: Acting("u_1", "a/b"),
    ],
)
def test_acting_user_is_a_valid_id(wrong: Callable[[], Acting]) -> None:
    with pytest.raises(ValueError, match="valid id"):
        wrong()


@pytest.mark.parametrize("of", [IDENTITY, Acting("u_request", "acme", True)])
def test_block_continues_for_an_identity_or_an_acting_user(of: object) -> None:
    """Such as in a thread that a request starts."""
    with acting_as(of) as chosen:
        assert acting() == chosen == Acting("u_request", "acme", True)
        assert chosen.test is chosen.is_test is True
    with acting_as(of, "globex") as chosen:
        assert chosen == Acting("u_request", "globex", True)


def test_only_integrations_accept_objects_as_users() -> None:
    with pytest.raises(TypeError, match="int"), acting_as(42):
        pass
    assert acting() is None
