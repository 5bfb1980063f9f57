"""The acting user of Celery tasks.

    app = Celery("proj")
    keyproxy_client.celery.install(app)

Publishing a task adds the acting user to the headers of its message; a worker makes it the acting user of the task. The
hooks are Celery's signals, which belong to the process: they serve every app in it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Final

from keyproxy_client import acting
from keyproxy_client.acting import Acting
from keyproxy_client.carried import acting_of
from keyproxy_client.missing_extra import missing_extra
from keyproxy_client.outgoing.repetition import STATUSES, is_refusal, retry_after_seconds

try:
    from celery import Celery, signals
    from celery.app.task import Task
    from celery.exceptions import ImproperlyConfigured
except ImportError as error:
    raise missing_extra("celery", error) from error

USER: Final = "keyproxy_user"
TENANT: Final = "keyproxy_tenant"
TEST: Final = "keyproxy_test"

#: A longer Retry-After is cut to this, before the jitter.
RETRY_SECONDS_MAX: Final = 3_600.0
#: At most this part of the wait is added, so that tasks that were refused together do not return together.
RETRY_JITTER: Final = 0.1


def install(app: Celery) -> None:
    """Carry the acting user from the code that publishes a task to the task. Further calls have no effect.

    Raises ImproperlyConfigured if the app publishes with task protocol 1, whose messages have no headers.
    """
    if _task_protocol(app) == 1:
        raise ImproperlyConfigured("task_protocol is 1: its messages carry no acting user; keyproxy needs protocol 2")
    signals.before_task_publish.connect(_add_headers, weak=False, dispatch_uid="keyproxy_client.add_headers")
    signals.task_prerun.connect(_enter, weak=False, dispatch_uid="keyproxy_client.enter")
    signals.task_postrun.connect(_leave, weak=False, dispatch_uid="keyproxy_client.leave")


def retry_later(task: Any, response: Any) -> None:
    """Retry the task after Retry-After if keyproxy refused its request for now; return after any other response.

    `response` comes from httpx, requests or aiohttp, whose body must have been read, or has `json()`. Raises what
    `task.retry` raises: Retry, or MaxRetriesExceededError after the task's `max_retries`.
    """
    status = response.status_code if hasattr(response, "status_code") else response.status
    seconds = retry_after_seconds(response.headers.get("Retry-After")) if status in STATUSES else None
    if seconds is None or not is_refusal(_body(response)):
        return
    jitter = 1.0 + RETRY_JITTER * random.random()  # noqa: S311 - spreads load, protects nothing
    countdown = min(seconds, RETRY_SECONDS_MAX) * jitter
    retried = task.retry(countdown=countdown)
    # Celery's raises, unless a task has its own.
    if isinstance(retried, BaseException):
        raise retried


def _body(response: Any) -> bytes:
    if not hasattr(response, "content"):
        # Of another client, or a double in a test.
        return json.dumps(response.json()).encode()
    content = response.content
    if not isinstance(content, bytes):
        # aiohttp's `content` is a stream, and its `read()` needs an event loop even if the body is here.
        content = getattr(response, "_body", None)
    if not isinstance(content, bytes):
        raise TypeError("the body of the response has not been read: await response.read() before retry_later")
    return content


def _task_protocol(app: Celery) -> object:
    if app.configured:
        return app.conf.task_protocol
    # Reading app.conf would send on_after_configure before the module that makes the app has connected its receivers,
    # such as the one that adds its periodic tasks. A copy reads the configuration without that effect.
    copy = Celery(**{**app.__reduce_keys__(), "fixups": (), "set_as_current": False})
    return copy.conf.task_protocol


@dataclass(eq=False, slots=True)
class _Run:
    """The task that runs in this context. `outer` is the task that called it eagerly."""

    task_id: str
    acting: Acting | None
    token: Token[Any]
    outer: _Run | None


_running: Final[ContextVar[_Run | None]] = ContextVar("keyproxy_client_celery_run", default=None)


def _add_headers(headers: dict[str, Any], body: object, **_: object) -> None:
    """Name the acting user in the message of a task. Headers that the publisher set win."""
    run = _running.get()
    if run is not None and headers.get("retries") and headers.get("id") == run.task_id:
        # A retry is the same task again: an acting_as around it does not change on whose behalf it runs.
        publisher = run.acting
    else:
        publisher = acting.acting()
        if USER in headers:
            _name_in_chord_bodies(body, publisher)
    if publisher is not None:
        for name, value in _as_headers(publisher).items():
            headers.setdefault(name, value)


def _name_in_chord_bodies(body: object, publisher: Acting | None) -> None:
    """Make the bodies of chords act for their publisher, although this header task acts for another user.

    The header task that ends last publishes the body. Without headers of its own, the body would act for the user of
    that task, and which one that is depends on timing.
    """
    embedded = body[2] if isinstance(body, tuple) and len(body) == 3 else {}
    named = {USER: ""} if publisher is None else _as_headers(publisher)
    if embedded.get("chord") is not None:
        embedded["chord"] = _named(embedded["chord"], named)
    if embedded.get("chain"):
        embedded["chain"] = [_with_named_bodies(step, named) for step in embedded["chain"]]


def _named(chord_body: Any, headers: Mapping[str, Any]) -> Any:
    """A body with these headers, unless it names a user. A copy: the publisher may use a signature for other users."""
    chord_body = _with_named_bodies(chord_body, headers)
    options = chord_body.get("options") or {}
    chosen = options.get("headers") or {}
    if USER in chosen:
        return chord_body
    return {**chord_body, "options": {**options, "headers": {**headers, **chosen}}}


def _with_named_bodies(signature: Any, headers: Mapping[str, Any]) -> Any:
    """A signature whose end, or whose parts, publish the body of a chord: that body has these headers."""
    options, parts = signature.get("options") or {}, signature.get("kwargs") or {}
    changed: dict[str, Any] = {}
    if options.get("chord") is not None:
        changed["chord"] = _named(options["chord"], headers)
    if options.get("chain"):
        changed["chain"] = [_with_named_bodies(step, headers) for step in options["chain"]]
    if changed:
        signature = {**signature, "options": {**options, **changed}}
    kind = signature.get("subtask_type")
    if kind in ("chain", "group"):
        tasks = [_with_named_bodies(task, headers) for task in parts["tasks"]]
        return {**signature, "kwargs": {**parts, "tasks": tasks}}
    if kind == "chord" and parts.get("body") is not None:
        return {**signature, "kwargs": {**parts, "body": _with_named_bodies(parts["body"], headers)}}
    return signature


def _enter(task_id: str, task: Task, **_: object) -> None:
    """Begin a task: act for the user that its message names, or for none."""
    request = task.request
    outer = _running.get()
    if request.is_eager:
        chosen, token = _enter_eager(request.headers or {})
    else:
        if outer is not None:
            # A time limit interrupted _leave of an earlier task. Replace what that left behind.
            acting.enter_task(None)
            outer = None
        chosen = _as_acting(vars(request))
        token = acting.enter_task(chosen)
    _running.set(_Run(task_id, chosen, token, outer))


def _enter_eager(headers: Mapping[str, Any]) -> tuple[Acting | None, Token[Any]]:
    """Begin a task that its caller runs in place, without a message: its headers, else the caller's acting user."""
    if not any(name in headers for name in (USER, TENANT, TEST)):
        return None, acting.enter_inherited()
    caller = acting.acting()
    chosen = _as_acting(headers if caller is None else {**_as_headers(caller), **headers})
    return chosen, acting.enter_task(chosen)


def _leave(task_id: str, **_: object) -> None:
    """End a task: restore the acting user that `_enter` replaced."""
    run = _running.get()
    if run is not None and run.task_id == task_id:
        acting.leave_task(run.token)
        _running.set(run.outer)


def _as_headers(chosen: Acting) -> dict[str, Any]:
    return {USER: chosen.user, TENANT: chosen.tenant, TEST: chosen.is_test}


def _as_acting(headers: Mapping[str, Any]) -> Acting | None:
    """The acting user that headers name; None if they name none, or if a value is invalid."""
    user = headers.get(USER)
    return None if user is None else acting_of(user, headers.get(TENANT), headers.get(TEST, False))
