"""The statements of queries.sql by name."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib import resources

_NAME = re.compile(r"^-- name: ([a-z_]+)$", re.MULTILINE)


@functools.cache
def load() -> Mapping[str, str]:
    """All statements by name, without the comments around them; read once. Raises ValueError for a duplicate name."""
    text = resources.files(__package__).joinpath("queries.sql").read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    statements: dict[str, str] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        if name in statements:
            raise ValueError(f"queries.sql has two statements named {name}")
        lines = [line for line in body.splitlines() if line.strip() and not line.startswith("--")]
        statements[name] = "\n".join(lines).removesuffix(";")
    return statements
