"""For whom tasks act in a worker of processes, with a broker between: after tasks that fail, time out or die."""

from __future__ import annotations

import os
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

ALICE = ["u_alice", "acme", False]


@pytest.fixture(scope="module")
def remote(deployment: Deployment) -> Iterator[Celery]:
    """The app as a process sees it that publishes tasks by their names, beside a worker with one process."""
    here = Path(__file__).parent
    environment = clean_environment() | {
        "CELERY_PROJECT_BROKER": deployment.broker_url,
        "CELERY_PROJECT_RESULTS": deployment.broker_url,
        "PYTHONPATH": str(here),
    }
    options = "--pool=prefork --concurrency=1 --max-tasks-per-child=8 --loglevel=ERROR"
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
        app.close()
        worker.terminate()
        worker.wait(30)


def task(app: Celery, name: str, *args: object) -> Any:
    return app.signature(f"celery_project.{name}", args)


def result(published: AsyncResult) -> Any:
    return published.get(timeout=30)


def test_no_task_of_a_process_acts_for_the_user_of_an_earlier_one(remote: Celery) -> None:
    before = [
        (task(remote, "who"), {}),
        (task(remote, "fail"), {}),
        (task(remote, "retry", {}), {}),
        (task(remote, "replaced"), {}),
        (task(remote, "leave_blocks_open", "u_leaked"), {}),
        (task(remote, "end_blocks_of_earlier_tasks"), {}),
        (task(remote, "sleep"), {"soft_time_limit": 0.1}),
        (task(remote, "sleep"), {"time_limit": 0.1}),
        (task(remote, "die"), {}),
        (task(remote, "who"), {}),
    ]
    published = []
    for earlier, options in before:
        with acting_as("u_alice", "acme"):
            first = earlier.apply_async(**options)
        published.append((first, [task(remote, "who_and_where").delay() for _ in range(2)]))
    assert result(published[-1][0]) == ALICE
    assert result(published[5][0]) == [ALICE, ALICE]
    expected = {1: ValueError, 6: SoftTimeLimitExceeded, 7: TimeLimitExceeded, 8: WorkerLostError}
    for number, error in expected.items():
        with pytest.raises(error):
            result(published[number][0])
    later = [result(one) for _, ones in published for one in ones]
    assert [found for found, _ in later] == [None] * 2 * len(before)
    assert len({process for _, process in later} - {os.getpid()}) >= 4


def test_chains_and_chords_carry_the_callers_user_over_a_broker(remote: Celery) -> None:
    with acting_as("u_alice", "acme"):
        chained = chain(task(remote, "begin"), task(remote, "append"), task(remote, "append")).delay()
        body = task(remote, "append")
        joined = chord([task(remote, "who"), task(remote, "who")], body, app=remote).delay()
        in_bob = task(remote, "who").set(headers={"keyproxy_user": "u_bob"})
        mixed = chord([task(remote, "who"), in_bob], body, app=remote).delay()
    assert result(chained) == [ALICE] * 3
    assert result(joined) == [ALICE] * 3
    assert result(mixed) == [ALICE, ["u_bob", "acme", False], ALICE]


def test_errbacks_act_for_the_failed_tasks_user_and_for_none_if_its_process_was_killed(remote: Celery) -> None:
    failing: list[tuple[str, dict[str, Any], Any]] = [
        ("fail", {}, ALICE),
        ("sleep", {"time_limit": 0.1}, None),
        ("die", {}, None),
    ]
    for name, options, expected in failing:
        published_errback = task(remote, "note_id")
        published = published_errback.freeze()
        with acting_as("u_alice", "acme"):
            errbacks = [task(remote, "note_failure"), published_errback]
            failed = task(remote, name).apply_async(link_error=errbacks, **options)
        assert result(published) == expected
        assert noted(failed.id, remote) == [expected]
