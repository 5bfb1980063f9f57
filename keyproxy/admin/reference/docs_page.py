"""The OpenAPI document as an HTML page. It loads no external resources and runs no script; its policy enforces both."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from typing import Any, Final

from keyproxy.admin import scopes

_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h2 { border-top: 1px solid #ccc; padding-top: 1.5rem; margin-top: 2.5rem; }
h2 code, td code { background: #f2f2f2; padding: .1em .3em; border-radius: 3px; }
h2 .method { display: inline-block; min-width: 4.5rem; font-weight: 700; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .3rem .6rem .3rem 0;
border-bottom: 1px solid #eee; vertical-align: top; } nav li { list-style: none; } nav ul { padding: 0; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e6e6e6; } a { color: #8ab4f8; }
h2 code, td code { background: #2a2d33; } td, th { border-color: #333; } }
"""


def page(document: Mapping[str, Any]) -> tuple[str, str]:
    """(the page of an OpenAPI document, its Content-Security-Policy)."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>keyproxy admin API</title><style>{_STYLE}</style>",
        "<h1>keyproxy admin API</h1>",
        "<p>Send <code>Authorization: Bearer TOKEN</code>; <code>keyproxy admin token create</code> creates a token.",
        "The same as a machine-readable document: <a href=/openapi.json>openapi.json</a>.</p>",
        _table(("scope", "allows"), [(_code(one), _text(text)) for one, text in scopes.DESCRIPTIONS.items()]),
        "<nav><ul>",
    ]
    operations = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for method, path, operation in operations:
        parts.append(
            f"<li><a href='#{operation['operationId']}'><code>{method} {_text(path)}</code></a> "
            f"{_text(operation['summary'])}"
        )
    parts.append("</ul></nav>")
    schemas = document["components"]["schemas"]
    parts += [_section(*operation, schemas) for operation in operations]
    parts.append("<h2>Values</h2>")
    parts += [_schema(name, schema) for name, schema in schemas.items()]
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return "\n".join(parts), policy


def _section(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    parts = [
        f"<h2 id='{operation['operationId']}'><span class=method>{method}</span> <code>{_text(path)}</code></h2>",
        f"<p>{_prose(operation['description'])}</p>",
    ]
    rows = [
        (_code(one["name"]), one["in"], _kind(one["schema"]), _prose(one.get("description", "")))
        for one in operation["parameters"]
    ]
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        rows += _fields(schemas[schema["$ref"].rpartition("/")[2]], "body")
    if rows:
        parts.append(_table(("name", "in", "value", ""), rows))
    responses = [
        (status, " ".join(_kind(content["schema"]) for content in one["content"].values()), _prose(one["description"]))
        for status, one in operation["responses"].items()
    ]
    parts.append(_table(("status", "value", ""), responses))
    return "\n".join(parts)


def _schema(name: str, schema: dict[str, Any]) -> str:
    head = f"<h3 id='schema-{_text(name)}'>{_text(name)}</h3><p>{_prose(schema.get('description', ''))}</p>"
    return head + _table(("name", "", "value", ""), _fields(schema, ""))


def _fields(schema: dict[str, Any], where: str) -> list[tuple[str, str, str, str]]:
    required = schema.get("required", [])
    return [
        (
            _code(name),
            where or ("always" if name in required else ""),
            _kind(field),
            _prose(field.get("description", "")),
        )
        for name, field in schema.get("properties", {}).items()
    ]


def _kind(schema: dict[str, Any]) -> str:
    """A short description of a schema."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"<a href='#schema-{_text(name)}'>{_text(name)}</a>"
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(_code(str(one)) for one in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    bounds = [f"{word} {schema[name]:g}" for name, word in (("minimum", "from"), ("maximum", "to")) if name in schema]
    default = f", default {_code(str(schema['default']))}" if schema.get("default") not in (None, "", [], {}) else ""
    return " ".join([_text(str(schema.get("type", "anything"))), *bounds]) + default


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(one)}" for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _prose(text: str) -> str:
    """Render text that contains `code`."""
    pieces = text.split("`")
    return "".join(_code(piece) if place % 2 else _text(piece) for place, piece in enumerate(pieces))


def _text(text: str) -> str:
    return html.escape(text, quote=True)
