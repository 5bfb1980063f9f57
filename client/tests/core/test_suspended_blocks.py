"""Blocks of `acting_as` that end elsewhere than they began: generators that are collected, and copied contexts."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Generator

from keyproxy_client.acting import Acting, acting, acting_as, enter_inherited, leave_task, task_scope

EARLIER, LATER, BLOCK = Acting("u_earlier"), Acting("u_later"), Acting("u_block")


def block(user: str = BLOCK.user) -> Generator[Acting | None, None, None]:
    with acting_as(user):
        yield acting()
        yield acting()


def test_a_block_of_an_earlier_task_that_ends_in_a_later_one_leaves_the_later_one_its_user() -> None:
    for later in (LATER, None):
        with task_scope(EARLIER):
            suspended = block()
            assert next(suspended) == BLOCK
        assert acting() is None
        with task_scope(later):
            suspended.close()
            assert acting() == later
        assert acting() is None


def test_blocks_that_end_in_the_order_of_their_begin_end_both() -> None:
    with task_scope(LATER):
        first, second = block("u_first"), block("u_second")
        assert next(first) == Acting("u_first")
        assert next(second) == Acting("u_second")
        first.close()
        assert acting() == Acting("u_second")
        second.close()
        assert acting() == LATER


def test_a_block_that_ends_in_another_thread_changes_neither_thread() -> None:
    suspended = block()
    with task_scope(EARLIER):
        next(suspended)
        found: list[Acting | None] = []

        def end() -> None:
            suspended.close()
            found.append(acting())

        thread = threading.Thread(target=end)
        thread.start()
        thread.join()
        assert found == [None]
        assert acting() == EARLIER


def test_a_coroutine_that_was_started_within_a_block_keeps_its_user() -> None:
    async def started() -> Acting | None:
        await ended.wait()
        return acting()

    async def start() -> Acting | None:
        with acting_as(BLOCK.user):
            task = asyncio.create_task(started())
        ended.set()
        assert acting() is None
        return await task

    ended = asyncio.Event()
    assert asyncio.run(start()) == BLOCK


def test_a_block_may_end_in_a_copy_of_the_context_in_which_it_began() -> None:
    suspended = block()
    with task_scope(EARLIER):
        next(suspended)
        contextvars.copy_context().run(suspended.close)
    assert acting() is None


def test_a_task_in_place_hands_its_caller_back_the_user_that_it_had() -> None:
    with task_scope(EARLIER):
        token = enter_inherited()
        assert acting() == EARLIER
        left_open = acting_as(BLOCK.user)
        left_open.__enter__()
        assert acting() == BLOCK
        leave_task(token)
        assert acting() == EARLIER
        left_open.__exit__(None, None, None)
        assert acting() == EARLIER
