"""What the compiled build compiles, against what there is: a new module of the request path is not forgotten."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Where everything runs per request, unless it is named below.
HOT = ("limits", "tokens", "wire")

#: What runs once for a connection or a process, with the reason that it stays as it is.
NOT_COMPILED = {
    "limits/account": "referred to weakly, which objects of compiled classes cannot be",
    "wire/collector": "tests shorten its times, which compiled rooms have built in",
    "wire/handshake": "subclasses of the ssl module's classes",
    "wire/listener": "accepts connections",
    "wire/tls": "certificates",
}


def rooms() -> list[str]:
    """ROOMS of setup.py, which cannot be imported."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "ROOMS":
            return list(ast.literal_eval(statement.value))
    raise AssertionError("setup.py names no ROOMS")


def test_every_compiled_room_exists_and_is_named_once() -> None:
    listed = rooms()
    assert [room for room in listed if not (ROOT / "keyproxy" / f"{room}.py").is_file()] == []
    assert len(set(listed)) == len(listed)


def test_every_module_of_the_request_path_is_compiled() -> None:
    there = {
        f"{folder}/{path.stem}"
        for folder in HOT
        for path in (ROOT / "keyproxy" / folder).glob("*.py")
        if path.stem != "__init__"
    }
    assert there - set(rooms()) == set(NOT_COMPILED)
