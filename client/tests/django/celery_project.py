"""A Celery app whose tasks report the user that they act for. Worker processes import it by its name."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from celery import Celery

from keyproxy_client import celery as keyproxy_celery
from keyproxy_client.acting import NoActingUser, acting, acting_as
from keyproxy_client.http import httpx_client

#: The user, tenant and mode of an acting user; None if there is none. JSON has no tuples.
Report = list[Any] | None

app = Celery("celery_project", set_as_current=False)
app.conf.update(
    broker_url=os.environ.get("CELERY_PROJECT_BROKER", "memory://"),
    result_backend=os.environ.get("CELERY_PROJECT_RESULTS", "cache+memory://"),
    broker_transport_options={"polling_interval": 0.002},
    task_default_queue="celery_project",
    worker_prefetch_multiplier=0,
    task_default_retry_delay=0,
    task_acks_late=True,
    worker_deduplicate_successful_tasks=True,
    worker_lost_wait=0.1,
    worker_hijack_root_logger=False,
)
keyproxy_celery.install(app)

if "CELERY_PROJECT_BROKER" in os.environ:
    from celery.concurrency.asynpool import AsynPool

    # The pool looks for processes that died each 5 seconds.
    AsynPool.timers = property(lambda pool: {pool.maintain_pool: 0.05})

#: Blocks of `acting_as` that tasks have begun and not ended.
suspended: list[Any] = []


def noted(name: str, project: Celery = app) -> Any:
    """What a task without a result has noted, within ten seconds: the result of the failed task may be stored earlier."""
    deadline = time.monotonic() + 10.0
    while (found := project.backend.get(f"noted {name}")) is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return None if found is None else json.loads(found)


def _note(name: str) -> None:
    app.backend.set(f"noted {name}", json.dumps([report()]))


def report() -> Report:
    found = acting()
    return None if found is None else [found.user, found.tenant, found.is_test]


@app.task
def who(*_: object) -> Report:
    return report()


@app.task
def begin(*_: object) -> list[Report]:
    return [report()]


@app.task
def append(earlier: list[Report], *_: object) -> list[Report]:
    return [*earlier, report()]


@app.task(bind=True)
def headers(self: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(self.request).items() if name.startswith("keyproxy_")}


@app.task
def note(name: str) -> None:
    _note(name)


@app.task
def note_failure(request: Any, error: BaseException, traceback: object) -> None:
    """An errback of the kind that Celery calls in place."""
    _note(request.id)


@app.task
def note_id(task_id: str) -> Report:
    """An errback of the kind that Celery publishes."""
    return report()


@app.task
def fail(*_: object) -> None:
    raise ValueError


@app.task(bind=True)
def retry(self: Any, options: dict[str, Any], block: str | None = None) -> Report:
    if self.request.retries:
        return report()
    if block is None:
        raise self.retry(countdown=0, **options)
    with acting_as(block):
        raise self.retry(countdown=0, **options)


@app.task(bind=True)
def replaced(self: Any) -> Any:
    raise self.replace(who.s())


@app.task
def spawn(block: str | None = None) -> str:
    """Publish a task; returns its id."""
    if block is None:
        return str(who.delay().id)
    with acting_as(block):
        return str(who.delay().id)


@app.task
def call_in_place(options: dict[str, Any]) -> list[Report]:
    """Run a task in place within a block; returns the acting user of the task, and that of the block afterwards."""
    with acting_as("u_block"):
        inner = who.apply(**options).get(disable_sync_subtasks=False)
        return [inner, report()]


@app.task
def in_a_thread() -> list[Report]:
    found: list[Report] = []
    thread = threading.Thread(target=lambda: found.append(report()))
    thread.start()
    thread.join()
    return found


def _block(user: str) -> Any:
    with acting_as(user):
        yield


@app.task
def leave_blocks_open(user: str) -> None:
    for block in (_block(user), _block(user)):
        next(block)
        suspended.append(block)
    suspended.append(acting_as(user))
    suspended[-1].__enter__()


@app.task
def end_blocks_of_earlier_tasks() -> list[Report]:
    """What the garbage collector does with suspended generators at any time; returns the acting user afterwards."""
    before = report()
    suspended.clear()
    return [before, report()]


@app.task
def call(origin: str, keys: str, test_keys: str) -> list[Any]:
    """Call keyproxy as a job does; returns the user that the upstream sees, or the class of the error."""
    found = acting()
    key = Path(test_keys if found is not None and found.is_test else keys)
    with httpx_client(origin=origin, key=key, timeout=10) as http:
        try:
            seen = dict(http.post("/v1/jobs", json={"job": 7}).json()["headers"])
        except NoActingUser as error:
            return [type(error).__name__]
    return [seen.get(f"X-Keyproxy-{name}") for name in ("User", "Tenant", "Test", "Actor", "Act-For")]


@app.task
def sleep() -> None:
    time.sleep(60)


@app.task
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def who_and_where() -> list[Any]:
    return [report(), os.getpid()]
