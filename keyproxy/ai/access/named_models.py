"""The models that a request names, in every place where an upstream may look for one."""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.access.access_rules import ModelRules
from keyproxy.ai.access.model_judgement import MODEL, MODEL_PLACES
from keyproxy.ai.access.value_sources import HEADER, PATH, QUERY, path_value
from keyproxy.ai.dialects.table import model_in_path
from keyproxy.ai.model_source import DIALECT
from keyproxy.ai.requests.model_lists import named_in
from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.scanning.request_parts import RequestParts

_FORM: Final = "form"
_NULL: Final = b"null"


class ModelPlaces:
    """The counting values of one request, by their names. `parts`: of its JSON, None without."""

    __slots__ = ("fields", "headers", "parts", "query")

    def __init__(
        self, parts: RequestParts | None, query: dict[str, str], headers: dict[str, str], fields: dict[str, str]
    ) -> None:
        self.parts: Final = parts
        self.query: Final = query
        self.headers: Final = headers
        self.fields: Final = fields


def named_models(
    rules: ModelRules, placeholders: dict[str, re.Pattern[bytes]], path: bytes, places: ModelPlaces
) -> tuple[str | None, tuple[str, ...]]:
    """The model of the route's source, None if it has none, and those of all other places.

    Raises a Refusal (REQUEST_MALFORMED) for a value of another type or shape.
    """
    source, dialect = rules.source, rules.dialect
    others: list[str] = []
    model = None if places.parts is None else _json_models(places.parts, rules.json_member, others)
    if source.kind == HEADER:
        model = places.headers.get(source.name.lower())
    elif source.kind in (QUERY, _FORM, PATH):
        model = None
    for kind, values in ((QUERY, places.query), (_FORM, places.fields)):
        for name, value in values.items():
            if source.kind == kind and name == source.name:
                model = value
            elif name in MODEL_PLACES:
                others.append(value)
    if source.kind == PATH:
        model = path_value(placeholders[source.name], path)
    if MODEL in placeholders:
        in_placeholder = path_value(placeholders[MODEL], path)
        if in_placeholder is not None:
            others.append(in_placeholder)
    in_path = None if dialect is None else model_in_path(dialect, path)
    if in_path is not None:
        if source.kind == DIALECT and model is None:
            model = in_path
        else:
            others.append(in_path)
    return model, tuple([other for other in others if other != model])


def _json_models(parts: RequestParts, member: str, others: list[str]) -> str | None:
    """The model in `member`; all others are appended to `others`."""
    model: str | None = None
    values = parts.values
    if member and member in values:
        value = values[member]
        if isinstance(value, str):
            model = value
        elif value != _NULL:
            raise malformed(f"'{member}' must be a string.", member)
    for name in MODEL_PLACES:
        if name == member or name not in values:
            continue
        value = values[name]
        if isinstance(value, str):
            others.append(value)
        elif value != _NULL:
            start, end = parts.spans[name]
            others += named_in(parts.content[start:end], name)
    return model
