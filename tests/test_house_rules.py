"""Architecture rules, checked on the syntax tree: allowed imports, the home of each library, size limits.

This is the documentation of the layers that cannot go stale. docs/decisions/ has the reasons.
"""

from __future__ import annotations

import ast
import collections
import functools
import graphlib
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "keyproxy"
CLIENT = ROOT / "client" / "keyproxy_client"

#: A module imports only modules of a strictly lower rank; the modules of one folder may import each other.
RANKS = {
    "": 0,
    "limit_state": 0,
    "problem_spec": 0,
    "mypyc_compat": 0,
    "reasons": 1,
    "limits": 2,
    "model": 3,
    "http_messages": 4,
    "ai": 5,
    "auth": 5,
    "http": 5,
    "oauth": 5,
    "ports": 6,
    "config": 6,
    "platform": 7,
    "signing": 7,
    "decision": 8,
    "metrics": 8,
    "store": 8,
    "wire": 8,
    "gateway": 9,
    "process": 10,
    "admin": 11,
    "authorize": 11,
    "demo": 12,
    "cli": 13,
    "__main__": 14,
}

#: Below this rank there is no waiting, logging, clock, system call or third-party library.
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

#: The only modules that may import a library.
HOMES = {
    "aiohttp": {"admin", "authorize", "cli", "demo", "process"},
    "asyncpg": {"store"},
    "cachetools": {"store"},
    "click": {"cli", "demo"},
    "cryptography": {"signing"},
    "httptools": {"wire"},
    "jwt": {"signing"},
    "multipart": {"ai"},
    "mypy_extensions": {"mypyc_compat"},
    "orjson": {"admin", "ai", "authorize", "cli", "demo", "metrics", "process", "store"},
    "pydantic": {"admin"},
    "prometheus_client": {"metrics"},
    "re2": {"process"},
    "redis": {"store"},
    "uvloop": {"cli", "demo"},
    "yarl": {"authorize", "demo"},
}

MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
POSITIONAL_MAX = 5  # with self
ROOT_MODULES_MAX = 8
FOLDER_MODULES_MAX = 15

#: The only modules of the client that may import a library; it imports no other, and never `keyproxy`.
CLIENT_HOMES = {
    "aiohttp": {"http", "outgoing"},
    "anyio": {"outgoing"},
    "asgiref": {"django"},
    "celery": {"celery", "django"},
    "cryptography": {"django", "incoming"},
    "django": {"django", "outgoing"},
    "fastapi": {"fastapi"},
    "httpx": {"http", "outgoing"},
    "jwt": {"incoming"},
    "kombu": {"celery"},
    "requests": {"http", "outgoing"},
    "rest_framework": {"django"},
    "rest_framework_api_key": {"django"},
    "starlette": {"fastapi"},
    "yarl": {"outgoing"},
}

#: An attribute that a module loads lazily, so that only type checkers see it.
CLIENT_HIDDEN = {"client/keyproxy_client/http.py hides keyproxy_client.outgoing.auth"}

MODULES = sorted(PACKAGE.rglob("*.py"))
CLIENT_MODULES = sorted(CLIENT.rglob("*.py"))
ALL_MODULES = [*MODULES, *CLIENT_MODULES]

#: Words for data that speaks, and for programs as persons. A few are right, as in the name of the user `nobody`.
DIALECT = re.compile(
    r"\b(told|tells?|says?|said|hears?|heard|asked of|whoever|nobody|what becomes of|in force|begins? anew|lets in)\b",
    re.IGNORECASE,
)
DIALECT_PER_THOUSAND_WORDS_MAX = 0.2

#: Texts for readers outside of docs/.
DOCUMENTS = ("README.md", "config.example.toml", "client/README.md")

#: Class names that two classes share on purpose.
SHARED_CLASS_NAMES = {
    "Claims", "Exchange", "Ledger", "Recorder",  # a port and its implementation
    "FieldError", "Limit", "Plan",  # a value and its form in the admin API
    "Endpoint",  # of the admin API, and of the authorization server
}  # fmt: skip

TYPE_CHECKING_USERS = {"keyproxy/cli/commands/admin.py", "keyproxy/cli/context.py", "keyproxy/mypyc_compat.py"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    """Every module a file imports, also inside functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)} imports relatively"
            if (node.module or "").partition(".")[0] in ("keyproxy", "keyproxy_client"):
                found += [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                found.append(node.module or "")
    return tuple(found)


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _client_room(path: Path) -> str:
    """The module of the client's top level, or the folder."""
    return path.relative_to(CLIENT).with_suffix("").parts[0]


def _is_of_django(path: Path) -> bool:
    """A migration, or an empty module that makes a package where Django looks for one."""
    return path.parent.name == "migrations" or (path.stem == "__init__" and path.stat().st_size == 0)


# A test checks all modules and lists what is wrong: a test per module would cost more than the check.


def test_module_imports_only_lower_ranks() -> None:
    wrong = []
    for path in MODULES:
        here = _room(path)
        for imported in _imports(path):
            if imported.partition(".")[0] != "keyproxy":
                continue
            there = [*imported.split("."), ""][1]
            there = there if there in RANKS else ""  # `from keyproxy import __version__`
            if not (there == here or RANKS[there] < RANKS[here]):
                wrong.append(f"{_name(path)} imports {there}")
    assert wrong == []


def test_library_is_imported_only_in_its_home_and_never_below_the_edges() -> None:
    wrong = []
    for path in MODULES:
        here = _room(path)
        for imported in _imports(path):
            library = imported.partition(".")[0]
            if library not in HOMES and library not in sys.stdlib_module_names | {"keyproxy"}:
                wrong.append(f"{library} in {_name(path)} has no home")
            if here not in HOMES.get(library, {here}):
                wrong.append(f"{library} in {_name(path)}")
            if RANKS[here] < PURE_BELOW and library in IMPURE:
                wrong.append(f"{library} in the pure room of {_name(path)}")
    assert wrong == []


def test_client_imports_no_part_of_keyproxy_and_each_library_only_in_its_home() -> None:
    wrong = []
    for path in CLIENT_MODULES:
        for imported in _imports(path):
            library = imported.partition(".")[0]
            if library in sys.stdlib_module_names | {"keyproxy_client"}:
                continue
            if _client_room(path) not in CLIENT_HOMES.get(library, set()):
                wrong.append(f"{library} in {_name(path)}")
    assert wrong == []


def test_modules_functions_and_signatures_are_within_their_size_limits() -> None:
    wrong = []
    for path in ALL_MODULES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MODULE_LINES_MAX:
            wrong.append(f"{_name(path)} has {lines} lines")
        for function in _functions(path):
            assert function.end_lineno is not None
            length = function.end_lineno - function.lineno + 1
            if length > FUNCTION_LINES_MAX:
                wrong.append(f"{function.name} of {_name(path)} has {length} lines")
            positional = len(function.args.posonlyargs) + len(function.args.args)
            if positional <= POSITIONAL_MAX or function.name == "__init__":
                continue
            if not any("command" in ast.unparse(decorator) for decorator in function.decorator_list):
                wrong.append(f"{function.name} of {_name(path)} takes {positional}")
    assert wrong == []


def test_every_module_and_public_name_has_a_docstring() -> None:
    wrong = []
    for path in ALL_MODULES:
        if path.is_relative_to(CLIENT) and _is_of_django(path):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            wrong.append(_name(path))
        wrong += [
            f"{node.name} of {_name(path)}"
            for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and not (node.name.startswith("_") or ast.get_docstring(node))
        ]
    assert wrong == []


def test_no_blind_except_below_an_outermost_boundary() -> None:
    wrong = []
    for path in ALL_MODULES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                is_boundary = caught == "Exception" and "outermost boundary" in lines[node.lineno - 1]
                # Cleaning up and raising again hides nothing.
                raises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                if caught in ("", "BaseException", "Exception") and not (is_boundary or raises):
                    wrong.append(f"{_name(path)}:{node.lineno}")
    assert wrong == []


def test_no_import_cycles() -> None:
    """Neither between folders nor within one, nor under TYPE_CHECKING."""
    names = {_module(path): path for path in ALL_MODULES}
    imports = {
        name: {target for imported in _imports(path) if (target := _known(imported, names)) not in (None, name)}
        for name, path in names.items()
    }
    order = graphlib.TopologicalSorter(imports)
    order.prepare()


def _module(path: Path) -> str:
    home = CLIENT.parent if path.is_relative_to(CLIENT) else ROOT
    return ".".join(path.relative_to(home).with_suffix("").parts).removesuffix(".__init__")


def _known(imported: str, names: Mapping[str, Path]) -> str | None:
    """The module of ours that an import statement loads."""
    for candidate in (imported, imported.rpartition(".")[0]):
        if candidate in names and candidate not in ("keyproxy", "keyproxy_client"):
            return candidate
    return None


def test_type_checking_blocks_contain_no_keyproxy_imports() -> None:
    hiding = {_name(path) for path in MODULES if "TYPE_CHECKING" in path.read_text(encoding="utf-8")}
    # Commands defer slow imports; the other one needs the type checker's view of a decorator.
    assert hiding == TYPE_CHECKING_USERS
    # The client hides libraries there, which it imports when it needs them.
    hidden = {
        f"{_name(path)} hides {imported}"
        for path in CLIENT_MODULES
        for imported in _hidden_imports(path)
        if imported.partition(".")[0] == "keyproxy_client"
    }
    assert hidden == CLIENT_HIDDEN


def _hidden_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for one in ast.walk(node):
                if isinstance(one, ast.Import):
                    yield from (alias.name for alias in one.names)
                elif isinstance(one, ast.ImportFrom):
                    yield one.module or ""


def _prose(path: Path) -> str:
    """Comments and strings of a module; all of another file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return " ".join(token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING))


@pytest.mark.parametrize("texts", ["code", "documentation"])
def test_texts_are_plain_english(texts: str) -> None:
    documents = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in DOCUMENTS)]
    prose = " ".join(_prose(path) for path in (ALL_MODULES if texts == "code" else documents))
    found = collections.Counter(match.group().lower() for match in DIALECT.finditer(prose))
    words = len(re.findall(r"[A-Za-z']+", prose))
    assert 1000 * found.total() / words <= DIALECT_PER_THOUSAND_WORDS_MAX, found.most_common(5)


def test_folders_stay_small_enough_to_read() -> None:
    sizes = collections.Counter(path.parent for path in ALL_MODULES if path.stem not in ("__init__", "__main__"))
    assert sizes.pop(PACKAGE) <= ROOT_MODULES_MAX
    assert {_name(folder): size for folder, size in sizes.items() if size > FOLDER_MODULES_MAX} == {}


def test_no_module_has_a_meaningless_name() -> None:
    assert not {path.stem for path in ALL_MODULES} & {"utils", "helpers", "common", "manager", "misc", "data", "info"}


def test_every_module_has_a_rank() -> None:
    assert {_room(path) for path in MODULES} == set(RANKS)


def test_class_names_are_unique() -> None:
    names = collections.Counter(
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, count in names.items() if count > 1} == SHARED_CLASS_NAMES


def test_reveal_is_called_only_where_a_key_is_issued_or_checked() -> None:
    """`reveal()` is the only access to a key's plaintext; few modules call it."""
    callers = {
        _name(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "reveal"
    }
    assert callers == {
        "keyproxy/auth/api_key.py",
        "keyproxy/auth/minting.py",
        "keyproxy/authorize/tokens/token_endpoint.py",
        "keyproxy/cli/remote/remote_keys.py",
        "keyproxy/demo/story.py",
        "keyproxy/store/directory/entities.py",
        "keyproxy/store/identities/drf_api_keys.py",
        "keyproxy/store/identities/unknown_credentials.py",
    }
