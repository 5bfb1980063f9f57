"""The identity of requests behind keyproxy, the acting user of background work, and authenticated outgoing requests.

Importing this package imports no framework. `keyproxy_client.celery` and the other modules are imported when they are
first used; each imports the library that it integrates, and names the extra to install if that is missing.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"

_MODULES = frozenset({"acting", "asgi", "celery", "django", "fastapi", "http", "identity", "keys", "wsgi"})


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
