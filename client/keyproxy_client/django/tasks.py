"""Tasks of Django (`django.tasks`, from Django 6.0) that act for the user that enqueued them.

    from keyproxy_client.django.tasks import task

    @task
    def run_job(job_id): ...

`enqueue` adds the acting user to the arguments of the task, as the keyword `_keyproxy`; the function does not receive it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from keyproxy_client import acting
from keyproxy_client.acting import Acting
from keyproxy_client.carried import acting_of

try:
    from django.tasks import Task
    from django.tasks import task as django_task
except ImportError:
    # Celery imports the module `tasks` of every installed application, also with an earlier Django.
    django_task = None

KEYWORD: Final = "_keyproxy"

Function = Callable[..., Any]


def task(function: Function | None = None, **options: Any) -> Any:
    """Like `django.tasks.task`, and the task acts for the user that enqueues it. A function may not use `_keyproxy`."""
    if django_task is None:
        raise ImportError("keyproxy_client.django.tasks needs Django 6.0 or later", name="django.tasks")
    make = django_task(**options)

    def decorate(decorated: Function) -> Task:
        made = make(_in_scope(decorated))
        values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.init}
        django_class: Any = type(made)
        acting_task: Task = _acting_class(django_class)(**values)
        return acting_task

    return decorate if function is None else decorate(function)


class _ActingTask:
    """The part of a task that names the acting user. Backends may have classes of their own for the other part."""

    __slots__ = ()
    _django_class: type[Task]

    def enqueue(self, *args: Any, **kwargs: Any) -> Any:
        """Queue the task."""
        named = kwargs if KEYWORD in kwargs else {**kwargs, KEYWORD: _values(acting.acting())}
        return super().enqueue(*args, **named)  # type: ignore[misc]

    async def aenqueue(self, *args: Any, **kwargs: Any) -> Any:
        """Queue the task."""
        named = kwargs if KEYWORD in kwargs else {**kwargs, KEYWORD: _values(await acting.acting_async())}
        return await super().aenqueue(*args, **named)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time: pickle and copy find it by that of Django.
        reduced: tuple[Any, ...] = super().__reduce__()  # type: ignore[assignment]
        return _restore, (self._django_class, *reduced[1])


@functools.cache
def _acting_class(django_class: Any) -> Any:
    return type("ActingTask", (_ActingTask, django_class), {"__slots__": (), "_django_class": django_class})


def _restore(django_class: Any, values: dict[str, Any]) -> Task:
    restored: Task = _acting_class(django_class)._reconstruct(values)
    return restored


def _in_scope(function: Function) -> Any:
    """The function with the keyword, acting for the user in it. Called without the keyword it acts for its caller."""
    signature = _with_keyword(inspect.signature(function))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if KEYWORD not in kwargs:
            return function(*args, **kwargs)
        with acting.task_scope(_acting_in(kwargs.pop(KEYWORD))):
            return function(*args, **kwargs)

    @functools.wraps(function)
    async def run_async(*args: Any, **kwargs: Any) -> Any:
        if KEYWORD not in kwargs:
            return await function(*args, **kwargs)
        with acting.task_scope(_acting_in(kwargs.pop(KEYWORD))):
            return await function(*args, **kwargs)

    scoped: Any = run_async if inspect.iscoroutinefunction(function) else run
    # For backends that check arguments before they queue a task.
    scoped.__signature__ = signature
    return scoped


def _with_keyword(signature: inspect.Signature) -> inspect.Signature:
    if KEYWORD in signature.parameters:
        raise TypeError(f"the keyword {KEYWORD} of a task is reserved for the acting user")
    parameters = list(signature.parameters.values())
    has_keywords = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    keyword = inspect.Parameter(KEYWORD, inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters.insert(len(parameters) - has_keywords, keyword)
    return signature.replace(parameters=parameters)


def _values(chosen: Acting | None) -> dict[str, Any] | None:
    return None if chosen is None else {"user": chosen.user, "tenant": chosen.tenant, "test": chosen.is_test}


def _acting_in(values: object) -> Acting | None:
    if not isinstance(values, Mapping):
        return None
    return acting_of(values.get("user"), values.get("tenant"), values.get("test", False))
