"""The compiled build compiles every module on the path of a request."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from keyproxy import gateway

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "keyproxy"


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("keyproxy_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compiled_modules_exist_and_are_named_once(setup: ModuleType) -> None:
    names = setup.compiled_modules(PACKAGE)
    assert [name for name in names if not (PACKAGE / f"{name}.py").is_file()] == []
    assert len(set(names)) == len(names)


def test_exceptions_exist_within_the_compiled_folders(setup: ModuleType) -> None:
    for name in setup.NOT_COMPILED:
        assert (PACKAGE / f"{name}.py").is_file()
        assert name.partition("/")[0] in setup.FOLDERS


def test_compiled_build_compiles_exactly_these_modules(setup: ModuleType) -> None:
    if gateway.__file__.endswith(".py"):
        pytest.skip("the pure build: make test-compiled")
    for name in (*setup.compiled_modules(PACKAGE), *setup.NOT_COMPILED):
        module = importlib.import_module(f"keyproxy.{name.replace('/', '.')}")
        assert module.__file__ is not None
        assert module.__file__.endswith(".py") == (name in setup.NOT_COMPILED), name
