"""How the requests of one route are judged beyond its own scopes: made when the configuration is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from keyproxy.ai.access.counted_names import CountedNames
from keyproxy.ai.access.known_instructions import KnownInstructions
from keyproxy.ai.access.model_judgement import MODEL_PLACES
from keyproxy.ai.access.named_models import ModelRules
from keyproxy.ai.access.namespaces import Bind
from keyproxy.ai.access.value_sources import HEADER, JSON, PATH, QUERY, ValueSource
from keyproxy.ai.categories import CategoryRules
from keyproxy.ai.dialects.endpoint import MemberPath
from keyproxy.ai.prompts import counting_paths, instruction_members
from keyproxy.ai.requests.request_reading import BodyBounds
from keyproxy.ai.scanning.json_bounds import JsonBounds
from keyproxy.ai.scanning.member_scope import JudgedMembers, MemberScope, scope_of_paths

_FORM: Final = "form"

#: A document is parsed and searched in one piece: with so many values that takes up to 30 ms.
_DOCUMENT_VALUES_MAX: Final = 32_768


class AccessRules:
    """The rules of one route. `model`, `categories`: None if it judges none.

    `placeholders`: of each placeholder that is read, a pattern of the route's paths with it in the first group.
    `members`: those of JSON that count, besides those with models. `known`: the instructions of earlier requests, if they
    are all that is read of the parsed document. `reads_json`, `reads_form`: whether a source
    is in the body. `needs_document`: the values are read from a parsed document; a model alone is read from the scan.
    """

    __slots__ = (
        "binds", "bounds", "categories", "form_names", "header_names", "known", "members", "model", "name",
        "needs_document", "placeholders", "query_names", "reads_body", "reads_form", "reads_json", "scope", "sources",
        "untyped_names",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        *,
        model: ModelRules | None = None,
        categories: CategoryRules | None = None,
        binds: tuple[Bind, ...] = (),
        placeholders: Mapping[str, re.Pattern[bytes]] | None = None,
        bounds: BodyBounds | None = None,
    ) -> None:
        self.name: Final = name
        self.model: Final = model
        self.categories: Final = categories
        self.binds: Final = binds
        self.placeholders: Final[dict[str, re.Pattern[bytes]]] = dict(placeholders or {})
        sources = {bind.source.text: bind.source for bind in binds}
        self.sources: Final[tuple[ValueSource, ...]] = tuple(sources.values())
        queries = [one.name for one in self.sources if one.kind == QUERY]
        headers = [one.name for one in self.sources if one.kind == HEADER]
        forms: list[str] = []
        source = None if model is None else model.source
        if source is not None:
            queries += [*MODEL_PLACES, *([source.name] if source.kind == QUERY else [])]
            headers += [source.name.lower()] if source.kind == HEADER else []
            forms += [*MODEL_PLACES, *([source.name] if source.kind == _FORM else [])]
        declared = () if categories is None else categories.declared
        headers += [one.name.lower() for one in declared if one.kind == HEADER]
        self.query_names: Final = CountedNames(queries)
        self.header_names: Final = CountedNames(headers)
        self.form_names: Final = CountedNames(forms)
        self.known: Final = KnownInstructions() if _needs_instructions_alone(self.sources, categories) else None
        self.members: Final = _members(self.sources, categories)
        members = [] if model is None else [(name,) for name in (*MODEL_PLACES, model.json_member) if name]
        self.scope: Final[MemberScope] = scope_of_paths(members, self.members)
        #: What counts in a body without a type, if a server reads it as a form.
        self.untyped_names: Final = CountedNames([path[0] for path in (*members, *self.members.paths)])
        self.needs_document: Final = _needs_document(self.sources, categories)
        bounds = BodyBounds() if bounds is None else bounds
        self.bounds: Final = _bounds_of_documents(bounds) if self.needs_document else bounds
        self.reads_json: Final = self.needs_document or (model is not None and bool(model.json_member))
        self.reads_form: Final = source is not None and source.kind == _FORM
        self.reads_body: Final = self.reads_json or self.reads_form or model is not None

    @property
    def path_names(self) -> list[str]:
        """The placeholders that are read."""
        return [one.name for one in self.sources if one.kind == PATH]


def _bounds_of_documents(bounds: BodyBounds) -> BodyBounds:
    json = bounds.json
    values_max = min(json.values_max, _DOCUMENT_VALUES_MAX)
    return BodyBounds(
        bounds.bytes_max, bounds.inflate_ratio_max, JsonBounds(values_max, json.containers_max, json.depth_max)
    )


def _members(sources: tuple[ValueSource, ...], categories: CategoryRules | None) -> JudgedMembers:
    paths: list[MemberPath] = [one.pointer for one in sources if one.kind == JSON]
    if categories is not None:
        paths += [one.pointer for one in categories.declared if one.kind == JSON]
        if categories.uses_template or categories.uses_patterns:
            paths += counting_paths(categories.shape)
    instructions = None
    if categories is not None and _needs_instructions_alone(sources, categories):
        instructions = instruction_members(categories.shape)
    return JudgedMembers(tuple(dict.fromkeys(paths)), instructions)


def _needs_instructions_alone(sources: tuple[ValueSource, ...], categories: CategoryRules | None) -> bool:
    if categories is None or not categories.uses_template or categories.uses_patterns or categories.declared:
        return False
    return not any(one.kind == JSON for one in sources)


def _needs_document(sources: tuple[ValueSource, ...], categories: CategoryRules | None) -> bool:
    if any(one.kind == JSON for one in sources):
        return True
    if categories is None:
        return False
    return categories.uses_template or categories.uses_patterns or any(one.kind == JSON for one in categories.declared)
