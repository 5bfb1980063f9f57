"""The acting user of tasks in a worker of processes, with a broker between: after tasks that fail, time out or die."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery.result import AsyncResult

from celery_project import noted
from deployment import Deployment, clean_environment
from keyproxy_client import celery as keyproxy_celery
from keyproxy_client.acting import acting_as

pytestmark = [
    pytest.mark.once,
    # Celery 5.5 beside the newest client of Redis
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),
]

ALICE = ["u_alice", "acme", False]
BOB = ["u_bob", "acme", False]


@pytest.fixture(scope="module")
def remote(deployment: Deployment) -> Iterator[Celery]:
    """The app as a process sees it that publishes tasks by their names, beside a worker with one process."""
    here = Path(__file__).parent
    environment = clean_environment() | {
        "CELERY_PROJECT_BROKER": deployment.broker_url,
        "CELERY_PROJECT_RESULTS": deployment.broker_url,
        "PYTHONPATH": str(here),
    }
    options = "--pool=prefork --concurrency=1 --max-tasks-per-child=12 --loglevel=ERROR"
    options += " --without-heartbeat --without-gossip --without-mingle"
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "--app=celery_project", "worker", *options.split()],
        env=environment,
        cwd=deployment.home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    app = Celery(broker=deployment.broker_url, backend=deployment.broker_url, set_as_current=False)
    app.conf.task_default_queue = "celery_project"
    keyproxy_celery.install(app)
    try:
        yield app
    finally:
        app.backend.result_consumer.stop()
        # A result that is collected later would open a connection to unsubscribe.
        app.backend.result_consumer._pubsub = None
        app.backend.client.connection_pool.disconnect()
        app.amqp.producer_pool.force_close_all()
        app.pool.force_close_all()
        app.close()
        worker.terminate()
        worker.wait(30)


def task(app: Celery, name: str, *args: object) -> Any:
    return app.signature(f"celery_project.{name}", args)


def result(published: AsyncResult) -> Any:
    return published.get(timeout=60)


def test_no_task_of_a_process_acts_for_the_user_of_an_earlier_one(remote: Celery) -> None:
    """Errbacks act for the user of the failed task, and for none after a task whose process was killed."""
    killed, lives = {"errbacks": None}, {"errbacks": ALICE}
    before: list[tuple[Any, dict[str, Any], Any]] = [
        (task(remote, "who"), {}, ALICE),
        (task(remote, "retry", {}), {}, ALICE),
        (task(remote, "replaced"), {}, ALICE),
        (task(remote, "leave_blocks_open", "u_leaked"), {}, None),
        (task(remote, "end_blocks_of_earlier_tasks"), {}, [ALICE, ALICE]),
        (task(remote, "fail"), lives, ValueError),
        (task(remote, "sleep"), {"soft_time_limit": 0.1, **lives}, SoftTimeLimitExceeded),
        (task(remote, "sleep"), {"time_limit": 0.1, **killed}, TimeLimitExceeded),
        (task(remote, "die"), killed, WorkerLostError),
        (task(remote, "who"), {}, ALICE),
    ]
    published = []
    for earlier, options, expected in before:
        in_place, over_the_broker = task(remote, "note_failure"), task(remote, "note_id")
        errback = over_the_broker.freeze()
        limits = {name: value for name, value in options.items() if name != "errbacks"}
        with acting_as("u_alice", "acme"):
            first = earlier.apply_async(link_error=[in_place, over_the_broker], **limits)
        followers = [task(remote, "who_and_where").delay() for _ in range(2)]
        published.append((first, errback, followers, options.get("errbacks"), expected))
    processes = set()
    for first, errback, followers, errbacks, expected in published:
        if isinstance(expected, type):
            with pytest.raises(expected):
                result(first)
            assert result(errback) == errbacks
            assert noted(first.id, remote) == [errbacks]
        else:
            assert result(first) == expected
        for follower in followers:
            found, process = result(follower)
            assert found is None
            processes.add(process)
    # Two were killed, and one ran as many tasks as it may.
    assert len(processes) >= 4


def test_chains_and_chords_carry_the_callers_user_over_a_broker(remote: Celery) -> None:
    with acting_as("u_alice", "acme"):
        chained = chain(task(remote, "begin"), task(remote, "append"), task(remote, "append")).delay()
        body = task(remote, "append")
        joined = chord([task(remote, "who"), task(remote, "who")], body, app=remote).delay()
        in_bob = task(remote, "who").set(headers={"keyproxy_user": "u_bob"})
        mixed = chord([task(remote, "who"), in_bob], body, app=remote).delay()
    assert result(chained) == [ALICE] * 3
    assert result(joined) == [ALICE] * 3
    assert result(mixed) == [ALICE, BOB, ALICE]


def test_the_body_of_a_chord_acts_for_its_publisher_also_if_chains_and_chords_in_its_header_act_for_others(
    remote: Celery,
) -> None:
    """The one process runs tasks in order, so that the part for the other user ends last."""
    who, body = task(remote, "who"), task(remote, "append")
    as_bob = who.clone().set(immutable=True, headers={"keyproxy_user": "u_bob"})
    again = who.clone(immutable=True)
    headers = [
        [again, chain(as_bob, again)],
        [again, chord([as_bob], who)],
        [again, chain(again, chord([as_bob], again), as_bob)],
    ]
    with acting_as("u_alice", "acme"):
        joined = [chord(header, body, app=remote).delay() for header in headers]
    unknown = [chord(header, body, app=remote).delay() for header in headers]
    assert [result(one)[-1] for one in joined] == [ALICE] * len(headers)
    assert [result(one)[-1] for one in unknown] == [None] * len(headers)
