"""The models that a request names, in every place where an upstream may look for one."""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.access.model_judgement import MODEL, MODEL_PLACES, NamedModels
from keyproxy.ai.access.value_sources import HEADER, JSON, PATH, QUERY, path_value
from keyproxy.ai.dialects.endpoint import Dialect
from keyproxy.ai.dialects.table import model_in_path
from keyproxy.ai.model_source import DIALECT, ModelSource
from keyproxy.ai.models import ModelTable
from keyproxy.ai.requests.model_lists import named_in
from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.scanning.member_scope import ALTERNATIVES
from keyproxy.ai.scanning.request_parts import RequestParts

_FORM: Final = "form"

#: As in `RouteRules`: clients choose targets and names.
_KEPT_MAX: Final = 1_024
_KEPT_CHARACTERS_MAX: Final = 256
_NULL: Final = b"null"


class ModelRules:
    """Where the requests of one route name models. `source`: the place of the model; `json_member`: the member there, if
    it is in JSON, else empty. `dialect`: of the route's tokens, None without. `field`: the start of the header line that
    names the model to the upstream. `placeholders`: see `AccessRules`."""

    __slots__ = ("_keeps", "_kept", "dialect", "field", "json_member", "placeholders", "source", "table")

    def __init__(
        self,
        source: ModelSource,
        table: ModelTable,
        *,
        dialect: Dialect | None,
        field: bytes,
        placeholders: dict[str, re.Pattern[bytes]] | None = None,
    ) -> None:
        self.source: Final = source
        self.table: Final = table
        self.dialect: Final = dialect
        self.field: Final = field
        self.placeholders: Final = {} if placeholders is None else placeholders
        is_usual = source.kind == DIALECT and dialect is not None and dialect.model_member
        self.json_member: Final = source.name if source.kind == JSON else MODEL if is_usual else ""
        self._keeps: Final = source.kind not in (HEADER, _FORM)
        #: By target, and the model in JSON as the source and as every API has it.
        self._kept: Final[dict[tuple[bytes, str | None, str | None], NamedModels]] = {}

    def models_of(
        self,
        target: bytes,
        parts: RequestParts | None,
        *,
        query: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        fields: dict[str, str] | None = None,
    ) -> NamedModels:
        """The models that a request names. Raises a Refusal (REQUEST_MALFORMED) for a value of another type or shape.

        `parts`: of its JSON, None without. The others are its counting values, by their names.
        """
        if fields or not self._keeps or (parts is not None and _has_lists(parts)):
            return self._named(target, parts, query=query, headers=headers, fields=fields)
        stated = usual = None
        if parts is not None:
            usual = parts.values.get(MODEL)
            stated = usual if self.json_member == MODEL else parts.values.get(self.json_member)
        if not (stated is None or isinstance(stated, str)) or not (usual is None or isinstance(usual, str)):
            return self._named(target, parts, query=query, headers=headers, fields=fields)
        key = (target, stated, usual)
        found = self._kept.get(key)
        if found is None:
            found = self._named(target, parts, query=query, headers=headers, fields=fields)
            if len(target) + len(stated or "") + len(usual or "") <= _KEPT_CHARACTERS_MAX:
                if len(self._kept) >= _KEPT_MAX:
                    self._kept.clear()
                self._kept[key] = found
        return found

    def replaced(self, named: NamedModels, model: str) -> NamedModels:
        """The models of a request that names another one at the route's source."""
        return NamedModels(model, named.others, self.table, self.field)

    def _named(
        self,
        target: bytes,
        parts: RequestParts | None,
        *,
        query: dict[str, str] | None,
        headers: dict[str, str] | None,
        fields: dict[str, str] | None,
    ) -> NamedModels:
        source, path = self.source, target.partition(b"?")[0]
        others: list[str] = []
        model = None if parts is None else _json_models(parts, self.json_member, others)
        if source.kind == HEADER:
            model = (headers or {}).get(source.name.lower())
        elif source.kind == PATH:
            model = path_value(self.placeholders[source.name], path)
        for kind, values in ((QUERY, query), (_FORM, fields)):
            for name, value in (values or {}).items():
                if source.kind == kind and name == source.name:
                    model = value
                elif name in MODEL_PLACES:
                    others.append(value)
        if MODEL in self.placeholders:
            in_placeholder = path_value(self.placeholders[MODEL], path)
            others += [] if in_placeholder is None else [in_placeholder]
        in_path = None if self.dialect is None else model_in_path(self.dialect, path)
        if in_path is not None and source.kind == DIALECT and model is None:
            model = in_path
        elif in_path is not None:
            others.append(in_path)
        return NamedModels(model, tuple([other for other in others if other != model]), self.table, self.field)


def _has_lists(parts: RequestParts) -> bool:
    return any(name in parts.values for name in ALTERNATIVES)


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
