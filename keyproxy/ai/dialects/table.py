"""The table of dialects, and the lookup of a request's endpoint by its method and the end of its path."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

from keyproxy.ai.dialects.anthropic import ANTHROPIC
from keyproxy.ai.dialects.bedrock import BEDROCK
from keyproxy.ai.dialects.endpoint import Dialect, DialectEndpoint, EndpointClass, ending_in
from keyproxy.ai.dialects.gemini import GEMINI
from keyproxy.ai.dialects.header import HEADER
from keyproxy.ai.dialects.ollama import OLLAMA
from keyproxy.ai.dialects.openai import OPENAI

DIALECTS: Final[dict[str, Dialect]] = {
    dialect.name: dialect for dialect in (OPENAI, ANTHROPIC, GEMINI, OLLAMA, BEDROCK, HEADER)
}

#: Methods that use no tokens, in every dialect.
_TOKENLESS_METHODS: Final = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS"})

#: Paths that use no tokens, in every dialect.
TOKENLESS: Final = DialectEndpoint(
    name="none",
    kind=EndpointClass.NONE,
    pattern=ending_in(
        rb"(?:/files|/uploads(?:/[^/]+/(?:parts|complete|cancel))?|/batches(?:/[^/]+/cancel)?"
        rb"|/api/(?:tags|ps|show|pull))"
    ),
)

#: If servers may read a path in several ways, the endpoint that uses the most applies.
_BY_CAUTION: Final = (
    EndpointClass.GENERATES, EndpointClass.MEDIA, EndpointClass.UNKNOWN, EndpointClass.READS, EndpointClass.NONE,
)  # fmt: skip

_PARAMETERS: Final = re.compile(rb";[^/]*")
_SLASHES: Final = re.compile(rb"/{2,}")

#: Paths contain models and ids, so the memory of earlier lookups is bounded, by entries and by their size.
_remembered: Final[dict[tuple[str, bytes], DialectEndpoint]] = {}
_models: Final[dict[tuple[str, bytes], str | None]] = {}
_REMEMBERED_MAX: Final = 4_096
_REMEMBERED_BYTES_MAX: Final = 256


def endpoint_of(dialect: Dialect, method: bytes, path: bytes) -> DialectEndpoint:
    """Return the row for a request. `path`: as sent, without the query."""
    if method in _TOKENLESS_METHODS:
        return TOKENLESS
    if method != b"POST":
        return dialect.usual
    key = (dialect.name, path)
    found = _remembered.get(key)
    if found is None:
        found = _lookup(dialect, path)
        if len(path) <= _REMEMBERED_BYTES_MAX:
            if len(_remembered) >= _REMEMBERED_MAX:
                _remembered.clear()
            _remembered[key] = found
    return found


def model_in_path(dialect: Dialect, path: bytes) -> str | None:
    """Return the model that a path names, decoded; None if it names none, or not in UTF-8."""
    if not dialect.model_paths:
        return None
    key = (dialect.name, path)
    if key in _models:
        return _models[key]
    found = _model(dialect, path)
    if len(path) <= _REMEMBERED_BYTES_MAX:
        if len(_models) >= _REMEMBERED_MAX:
            _models.clear()
        _models[key] = found
    return found


def _model(dialect: Dialect, path: bytes) -> str | None:
    for pattern in dialect.model_paths:
        match = pattern.match(path)
        if match is not None:
            try:
                return unquote_to_bytes(match[1]).decode("utf-8")
            except UnicodeDecodeError:
                return None
    return None


def _lookup(dialect: Dialect, path: bytes) -> DialectEndpoint:
    """Match the path as sent, and as a lenient server may normalise it."""
    found = [_row(dialect, path)]
    if b"%" in path or b";" in path or b"//" in path or path.endswith(b"/"):
        plain = _SLASHES.sub(b"/", _PARAMETERS.sub(b"", unquote_to_bytes(_PARAMETERS.sub(b"", path)))).rstrip(b"/")
        found.append(_row(dialect, plain))
    return min(found, key=lambda row: _BY_CAUTION.index(row.kind))


def _row(dialect: Dialect, path: bytes) -> DialectEndpoint:
    for row in dialect.endpoints:
        if row.pattern.match(path):
            return row
    return TOKENLESS if TOKENLESS.pattern.match(path) else dialect.usual
