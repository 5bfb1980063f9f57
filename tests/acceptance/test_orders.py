"""Messages between a supervisor and a worker arrive complete and in order, and both detect the other's exit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from keyproxy.process import control_channel
from keyproxy.process.control_channel import Order
from keyproxy.process.reload import ReloadError
from keyproxy.process.worker_pool import Worker, WorkerPool

#: Configurations: empty; with characters that break JSON or lines; larger than a socket buffer.
TEXTS = ["", '[listen]\nname = "hü \u2028 \\ \x00"\r\n', "# long\n" * 200_000]

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The supervisor's end, the worker's end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("text", TEXTS, ids=["empty", "odd", "long"])
async def test_a_worker_starts_with_the_configuration_text_unchanged(pair: Pair, text: str) -> None:
    supervisor_end = await control_channel.supervisor_end(pair[0])
    supervisor_end.begin(Order(control_channel.BEGIN, text, ["private"]))
    begun = await asyncio.to_thread(control_channel.begun_with, pair[1])
    assert (begun.text, begun.keys) == (text, ["private"])
    worker_end = await control_channel.worker_end(pair[1])
    received: list[Order] = []

    async def following() -> None:
        async for order in worker_end.orders():
            received.append(order)
            worker_end.reply("" if order.kind != control_channel.OFFER else "no\nway")

    task = asyncio.create_task(following())
    assert await supervisor_end.send(Order(control_channel.OFFER, text)) == "no\nway"
    assert await supervisor_end.send(Order(control_channel.WITHDRAW)) == ""
    await supervisor_end.close()
    await asyncio.wait_for(task, 5)
    assert [(order.kind, order.text) for order in received] == [
        (control_channel.OFFER, text), (control_channel.WITHDRAW, ""),
    ]  # fmt: skip
    await worker_end.close({})


async def test_an_order_to_a_worker_that_stops_is_refused_and_its_last_message_arrives(pair: Pair) -> None:
    supervisor_end = await control_channel.supervisor_end(pair[0])
    worker_end = await control_channel.worker_end(pair[1])
    in_flight = asyncio.create_task(supervisor_end.send(Order(control_channel.OFFER, "a")))
    async for _order in worker_end.orders():
        break
    worker_end.stop()
    assert await asyncio.wait_for(in_flight, 5) == "the worker is stopping"
    await worker_end.close({"kid": 12.5})
    assert await asyncio.wait_for(supervisor_end.signed_until(), 5) == {"kid": 12.5}
    assert await supervisor_end.signed_until() == {"kid": 12.5}
    with pytest.raises(ConnectionError):
        await supervisor_end.send(Order(control_channel.APPLY))
    await supervisor_end.close()


async def test_a_worker_that_crashes_leaves_no_last_message(pair: Pair) -> None:
    supervisor_end = await control_channel.supervisor_end(pair[0])
    pair[1].close()
    assert await asyncio.wait_for(supervisor_end.signed_until(), 5) is None
    await supervisor_end.close()


def test_an_order_does_not_show_the_keys_that_it_carries() -> None:
    assert "private" not in repr(Order(control_channel.KEYS, "", ["private"]))


async def test_the_end_of_either_is_noticed_by_the_other(pair: Pair) -> None:
    supervisor_end = await control_channel.supervisor_end(pair[0])
    pair[1].close()
    with pytest.raises(ConnectionError):
        await supervisor_end.send(Order(control_channel.APPLY))
    await supervisor_end.close()
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(ConnectionError, match="the supervisor has exited"):
        control_channel.begun_with(theirs)


@pytest.mark.parametrize(
    ("program", "message"), [("sleep", "has not responded for 0.1 s"), ("true", "does not respond")]
)
async def test_an_unresponsive_worker_is_killed_and_blocks_the_reload(program: str, message: str) -> None:
    crew = WorkerPool(lambda: 0)
    async with contextlib.AsyncExitStack() as stack:
        worker = await Worker.start(["sh", "-c", f"exec {program} 60"], os.environ, Order(control_channel.BEGIN))
        stack.push_async_callback(worker.closed)
        stack.callback(worker.send_signal, signal.SIGKILL)
        worker.is_ready, worker.patience_seconds = True, 0.1
        crew.members.add(worker)
        with pytest.raises(ReloadError, match=message):
            await crew.offer("")
        assert await asyncio.wait_for(worker.process.wait(), 5) == (-signal.SIGKILL if program == "sleep" else 0)
        assert await worker.follows(Order(control_channel.APPLY)), "it is not waited for once more"
