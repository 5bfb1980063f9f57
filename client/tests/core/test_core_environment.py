"""The environment without packages, and what importing the client loads there."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from keyproxy_client import http
from keyproxy_client.identity import Trust

FRAMEWORKS = (
    "aiohttp", "celery", "cryptography", "django", "fastapi", "httpx", "jwt", "requests", "rest_framework", "starlette",
)  # fmt: skip


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_environment_has_no_framework(name: str) -> None:
    assert importlib.util.find_spec(name) is None


def test_environment_has_no_keyproxy() -> None:
    assert importlib.util.find_spec("keyproxy") is None


def test_import_loads_few_modules_and_no_other_part_of_the_client() -> None:
    code = "import sys; before = set(sys.modules); import keyproxy_client; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = [name for name in done.stdout.split() if name.startswith("keyproxy_client")]
    assert ours == ["keyproxy_client"]


def importing(name: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(f"keyproxy_client.{name}")


@pytest.mark.parametrize(
    ("use", "extra"),
    [
        (importing("celery"), "celery"),
        (importing("fastapi"), "fastapi"),
        (importing("django"), "django"),
        (importing("django.apps"), "django"),
        (importing("django.middleware"), "django"),
        (importing("django.tasks"), "django"),
        (importing("django.drf"), "drf"),
        (lambda: http.httpx_client(origin="http://h", key="kp_live_key"), "httpx"),
        (lambda: http.httpx_async_client(origin="http://h", key="kp_live_key"), "httpx"),
        (lambda: http.requests_session(origin="http://h", key="kp_live_key"), "requests"),
        (lambda: http.keyproxy_middleware("http://h", "kp_live_key"), "aiohttp"),
        (lambda: Trust.signed("http://h/jwks.json"), "signed"),
    ],
)
def test_an_integration_without_its_library_names_the_extra(use: Callable[[], Any], extra: str) -> None:
    with pytest.raises(ImportError, match=rf"is not installed: pip install .*'keyproxy-client\[{extra}\]'"):
        use()
