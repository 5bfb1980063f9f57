"""Modules that take long to import are imported at their first use.

Every process of a parallel run imports every module of tests, but runs the tests of a few. An import statement would
import at once a module that another has already declared here.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def lazily(*names: str) -> list[ModuleType]:
    """These modules; one is imported when an attribute of it is first read."""
    return [_declared(name) for name in names]


def load(*modules: ModuleType) -> None:
    """Import the modules now."""
    for module in modules:
        # Any attribute will do.
        getattr(module, "__path__", None)


def _declared(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(name)
        spec.loader = loader = importlib.util.LazyLoader(spec.loader)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        loader.exec_module(sys.modules[name])
    return sys.modules[name]
