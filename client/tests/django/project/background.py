"""Tasks of Django, which need Django 6.0 or later, and a backend with a class of its own for them."""

from __future__ import annotations

from typing import Any

from django.tasks import Task
from django.tasks.backends.immediate import ImmediateBackend

from keyproxy_client.acting import acting, acting_as
from keyproxy_client.django.tasks import task

Report = list[Any] | None


class OwnTask(Task):
    """The class of a backend."""

    __slots__ = ()


class OwnBackend(ImmediateBackend):
    """A backend with a class of its own."""

    task_class = OwnTask


def report() -> Report:
    found = acting()
    return None if found is None else [found.user, found.tenant, found.is_test]


@task
def who() -> Report:
    return report()


@task(backend="stored")
def stored_who(*values: int, factor: int = 1) -> Any:
    return [report(), sum(values) * factor]


@task(backend="stored", takes_context=True)
async def stored_who_async(context: Any, **values: int) -> Any:
    return [report(), values]


@task(backend="own", priority=3)
def own_who() -> Report:
    return report()


@task
def fail() -> None:
    raise ValueError


@task
def leave_a_block_open() -> None:
    blocks.append(acting_as("u_leaked"))
    blocks[-1].__enter__()


blocks: list[Any] = []
