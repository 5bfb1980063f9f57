"""The environment without packages, and what importing the client loads there."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("django", "django"), ("django.middleware", "django"), ("django.drf", "django"), ("django.tasks", "django"),
        ("celery", "celery"), ("fastapi", "fastapi"),
    ],
)  # fmt: skip
def test_import_of_an_integration_without_its_library_names_the_extra(module: str, extra: str) -> None:
    with pytest.raises(ImportError, match=rf"keyproxy-client\[{extra}\]"):
        importlib.import_module(f"keyproxy_client.{module}")
