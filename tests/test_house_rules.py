"""The architecture, held by the syntax tree: which room may see which, where libraries live, how large things get.

This is the document of the rooms that cannot go stale. docs/decisions/ says why they are as they are.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "keyproxy"

#: A module imports only what stands on a strictly lower rank; the modules of one folder may see each other.
RANKS = {
    "": 0,
    "addresses": 0,
    "compiling": 0,
    "ratelimit": 0,
    "reasons": 1,
    "limits": 2,
    "model": 3,
    "admission": 4,
    "dsn": 4,
    "headers": 4,
    "idempotency": 4,
    "keyformat": 4,
    "problems": 4,
    "routes": 4,
    "target": 4,
    "tokens": 4,
    "webhooks": 4,
    "credential": 5,
    "keyscan": 5,
    "ports": 5,
    "settings": 5,
    "config": 6,
    "route_review": 6,
    "metering": 6,
    "clock": 7,
    "orders": 7,
    "sockets": 7,
    "streams": 7,
    "systemd": 7,
    "presence": 8,
    "departure": 8,
    "metrics": 8,
    "store": 8,
    "wire": 8,
    "neighbours": 9,
    "control": 10,
    "probe": 9,
    "gateway": 9,
    "connections": 9,
    "ops": 10,
    "change": 11,
    "readings": 11,
    "admin": 11,
    "app": 12,
    "crew": 12,
    "serving": 13,
    "supervisor": 13,
    "demo": 13,
    "cli": 14,
    "__main__": 15,
}

#: Below this rank nothing waits, logs, reads a clock or touches the system, and nothing is a third-party library's.
PURE_BELOW = 7
IMPURE = {
    "asyncio",
    "time",
    "os",
    "logging",
    "operator",
    "socket",
    "random",
    "secrets",
    "threading",
    "subprocess",
    "datetime",
}

#: The only rooms that may import a library.
HOMES = {
    "aiohttp": {"admin", "connections", "crew", "demo", "ops"},
    "asyncpg": {"store"},
    "cachetools": {"store"},
    "click": {"cli", "demo"},
    "httptools": {"wire"},
    "mypy_extensions": {"compiling"},
    "orjson": {"admin", "metrics", "ops", "cli", "crew", "demo", "store", "tokens"},
    "pydantic": {"admin"},
    "prometheus_client": {"metrics"},
    "redis": {"store"},
    "uvloop": {"cli", "demo"},
}

MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
POSITIONAL_MAX = 5  # with self

MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def _imports(path: Path) -> Iterator[str]:
    """Every module a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)} imports relatively"
            if node.module == "keyproxy":
                yield from (f"keyproxy.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_imports_only_lower_rooms(path: Path) -> None:
    here = _room(path)
    for imported in _imports(path):
        if imported.partition(".")[0] != "keyproxy":
            continue
        there = [*imported.split("."), ""][1]
        there = there if there in RANKS else ""  # `from keyproxy import __version__`
        assert there == here or RANKS[there] < RANKS[here], f"{here} imports {there}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_library_is_imported_only_in_its_home_and_never_below_the_edges(path: Path) -> None:
    here = _room(path)
    for imported in _imports(path):
        library = imported.partition(".")[0]
        if library in HOMES:
            assert here in HOMES[library], f"{library} in {here}"
        else:
            assert library in sys.stdlib_module_names | {"keyproxy"}, f"{library} has no home"
        if RANKS[here] < PURE_BELOW:
            assert library not in IMPURE, f"{library} in the pure room {here}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_modules_functions_and_signatures_keep_their_bounds(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MODULE_LINES_MAX
    for function in _functions(path):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= FUNCTION_LINES_MAX, f"{function.name} has {length} lines"
        positional = len(function.args.posonlyargs) + len(function.args.args)
        is_command = any("command" in ast.unparse(decorator) for decorator in function.decorator_list)
        is_made_of_parts = function.name == "__init__"
        assert positional <= POSITIONAL_MAX or is_command or is_made_of_parts, f"{function.name} takes {positional}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_every_module_and_public_name_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_nothing_is_caught_blindly_below_an_outermost_boundary(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            assert caught not in ("", "BaseException"), f"line {node.lineno}"
            if caught == "Exception":
                assert "outermost boundary" in lines[node.lineno - 1], f"line {node.lineno}"


def test_no_module_is_called_after_nothing() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "common", "manager", "misc", "data", "info"}


def test_every_module_has_a_rank() -> None:
    assert {_room(path) for path in MODULES} == set(RANKS)


def test_secrets_are_revealed_only_where_a_key_is_handed_to_its_owner_or_checked() -> None:
    """`reveal()` is the only way to a key's plaintext; who calls it is a short list."""
    callers = {
        _name(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "reveal"
    }
    assert callers == {
        "keyproxy/admin/client.py", "keyproxy/credential.py", "keyproxy/demo/__init__.py", "keyproxy/keyformat.py",
        "keyproxy/store/directory_desk.py", "keyproxy/store/foreign.py",
    }  # fmt: skip
