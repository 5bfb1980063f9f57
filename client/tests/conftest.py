"""What the tests of all environments share."""

from __future__ import annotations

import contextvars
import inspect
import logging
from collections.abc import Iterator

import pytest

from deployment import VARIABLE, Deployment


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    """Run each test in a context of its own: what one leaves in context variables must not act in the next."""
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    contextvars.copy_context().run(pyfuncitem.obj, **arguments)
    return True


@pytest.fixture(scope="module", autouse=True)
def restored_logging() -> Iterator[None]:
    """Undo what a module does to logging, such as by a Celery worker in the process: later tests read what is logged."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = [handler for handler in root.handlers if handler in handlers]


@pytest.fixture(scope="session")
def deployment() -> Deployment:
    """The keyproxy of this row: see `deployment.py`. Skips the test outside `make test-client`."""
    named = Deployment.named()
    if named is None:
        pytest.skip(f"{VARIABLE} names no keyproxy: run `make test-client`")
    return named
