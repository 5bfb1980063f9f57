"""The compiled build compiles every module on the path of a request."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
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


def test_interpreted_classes_extend_only_compiled_classes_that_allow_it(setup: ModuleType) -> None:
    """Otherwise the pure build works, and the compiled one cannot make an object of the class."""
    compiled = set(setup.compiled_modules(PACKAGE))
    open_classes = {name: _open_classes(PACKAGE / f"{name}.py") for name in compiled}
    interpreted = [path for path in PACKAGE.rglob("*.py") if _name(path) not in compiled]
    found = [(_name(path), module, base) for path in interpreted for module, base in _imported_bases(path)]
    extended = [one for one in found if one[1] in compiled]
    assert extended
    assert [one for one in extended if one[2] not in open_classes[one[1]]] == []


def test_handlers_of_one_function_bind_exceptions_of_different_types_to_different_names(setup: ModuleType) -> None:
    """mypyc gives a name one type in a function: the second handler would raise TypeError in the compiled build."""
    found = [
        (name, function.name)
        for name in setup.compiled_modules(PACKAGE)
        for function in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and _names_of_two_types(function)
    ]
    assert found == []


def _names_of_two_types(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    bound = {
        (node.name, ast.unparse(node.type))
        for node in ast.walk(function)
        if isinstance(node, ast.ExceptHandler) and node.name is not None and node.type is not None
    }
    names = [name for name, _ in bound]
    return {name for name in names if names.count(name) > 1}


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


def _imported_bases(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of every imported base class, also of `module.Class`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name: (node.module.removeprefix("keyproxy").lstrip(".").replace(".", "/"), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("keyproxy")
        for alias in node.names
    }
    for node in ast.walk(tree):
        for base in node.bases if isinstance(node, ast.ClassDef) else ():
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name) and plain.id in imported:
                yield imported[plain.id]
            elif isinstance(plain, ast.Attribute) and isinstance(plain.value, ast.Name) and plain.value.id in imported:
                folder, module = imported[plain.value.id]
                yield f"{folder}/{module}".lstrip("/"), plain.attr


def _open_classes(path: Path) -> set[str]:
    """The classes of a module that interpreted classes may extend."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any("allow_interpreted_subclasses=True" in ast.unparse(one) for one in node.decorator_list)
    }


def test_compiled_build_compiles_exactly_these_modules(setup: ModuleType) -> None:
    if gateway.__file__.endswith(".py"):
        pytest.skip("the pure build: make test-compiled")
    for name in (*setup.compiled_modules(PACKAGE), *setup.NOT_COMPILED):
        module = importlib.import_module(f"keyproxy.{name.replace('/', '.')}")
        assert module.__file__ is not None
        assert module.__file__.endswith(".py") == (name in setup.NOT_COMPILED), name
