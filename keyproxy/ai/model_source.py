"""Which model a request names: in its JSON, path, query or a header, as the route's setting `model` selects."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from keyproxy.ai.access.counted_names import CountedNames, counted_pairs
from keyproxy.ai.dialects.endpoint import Dialect
from keyproxy.ai.dialects.table import model_in_path
from keyproxy.ai.models import Candidates, Model, ModelTable
from keyproxy.ai.requests.request_facts import RequestFacts, malformed

#: The place of the route's dialect.
DIALECT: Final = ""
NONE: Final = "none"

_KINDS: Final = ("json", "path", "query", "header", "form")
_MEMBER_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_FIELD_NAME: Final = re.compile(r"[A-Za-z0-9-]{1,64}")

_MODEL: Final = "model"


class ModelSource(NamedTuple):
    """`kind`: DIALECT, NONE, or one of `json`, `path`, `query`, `header`, `form`; then `name` is that of the place."""

    kind: str
    name: str = ""

    @property
    def json_member(self) -> str | None:
        """The member that names the model in place of the dialect's; empty: none does. None: the dialect's."""
        if self.kind == DIALECT:
            return None
        return self.name if self.kind == "json" else ""


class Named:
    """The models of a request's single places. `model`: of the route's source."""

    __slots__ = ("model", "others")

    def __init__(self, model: str | None, others: tuple[str, ...] = ()) -> None:
        self.model: Final = model
        self.others: Final = others

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and (self.model, self.others) == (other.model, other.others)

    def __hash__(self) -> int:
        return hash((self.model, self.others))

    def __repr__(self) -> str:
        return f"Named({self.model!r}, {self.others})"


def parse_model_source(text: str) -> ModelSource:
    """Read the setting `model` of a route. Raises ValueError, whose text describes the fault."""
    if text in (DIALECT, NONE):
        return ModelSource(text)
    kind, colon, name = text.partition(":")
    if not colon or kind not in _KINDS:
        raise ValueError(f"must be empty, none, or one of {', '.join(f'{kind}:NAME' for kind in _KINDS)}")
    if not (_FIELD_NAME if kind == "header" else _MEMBER_NAME).fullmatch(name):
        raise ValueError(f"{name!r} is not a valid name in {kind}:NAME")
    return ModelSource(kind, name)


def named_models(
    source: ModelSource,
    dialect: Dialect,
    facts: RequestFacts,
    *,
    path: bytes,
    query: bytes = b"",
    value: str | None = None,
) -> Named:
    """Return the models that a request names in its single places.

    `value`: of the source, for `path`, `header` and `form`, which the caller reads. Raises a Refusal
    (REQUEST_MALFORMED) for a query with two models.
    """
    in_json = json_model(facts)
    in_path = model_in_path(dialect, path)
    in_query = query_value(query, _MODEL) if query else None
    model: str | None
    match source.kind:
        case "":
            model = facts.model if facts.model is not None else in_path
        case "json":
            model = facts.model
        case "query":
            model = query_value(query, source.name)
        case "none":
            model = in_json if in_json is not None else in_path
        case _:
            model = value
    if (in_json is None or in_json == model) and in_path is None and in_query is None:
        return Named(model)
    others = [other for other in (in_json, in_path, in_query) if other is not None and other != model]
    return Named(model, tuple(others))


def candidates_of(table: ModelTable, named: Named, alternatives: tuple[str, ...] = ()) -> Candidates:
    """Return the models that may serve a request. Raises a Refusal if two places name models of different rows."""
    model = table.find(named.model)
    for other in named.others:
        found = table.find(other)
        if found is not None and found is not model:
            raise malformed("The request names two different models.", _MODEL)
    if not alternatives:
        return Candidates(model)
    rows: list[Model | None] = [table.find(name) for name in alternatives]
    return Candidates(model, tuple(rows))


def query_value(query: bytes, name: str) -> str | None:
    """Return the value of a query's parameter, decoded once; None without it.

    Raises a Refusal if it occurs twice, or in a spelling that some servers take for it.
    """
    return counted_pairs(query, CountedNames((name,)), "query").get(name)


def json_model(facts: RequestFacts) -> str | None:
    """Return the model that the request's JSON names where the dialects have it; None without one."""
    value = None if facts.parts is None else facts.parts.values.get(_MODEL)
    return value if isinstance(value, str) else None
