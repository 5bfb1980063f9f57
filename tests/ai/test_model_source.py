"""The model of a request stands in one place, and no second place may name another one."""

from __future__ import annotations

from typing import Any

import pytest

from keyproxy.ai.dialects.table import DIALECTS
from keyproxy.ai.model_source import ModelSource, Named, candidates_of, named_models, parse_model_source, query_value
from keyproxy.ai.models import Model, ModelTable
from keyproxy.reasons import Reason, Refusal
from tests.ai.requests_support import PATHS, facts

TABLE = ModelTable([Model("a", ("a-1",)), Model("b")])


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("", ModelSource("")), ("none", ModelSource("none")), ("json:engine", ModelSource("json", "engine")),
        ("path:model", ModelSource("path", "model")), ("query:m", ModelSource("query", "m")),
        ("header:X-Model", ModelSource("header", "X-Model")), ("form:model", ModelSource("form", "model")),
    ],
)  # fmt: skip
def test_a_source_is_parsed(text: str, source: ModelSource) -> None:
    assert parse_model_source(text) == source


@pytest.mark.parametrize("text", ["json", "json:", "body:x", "header:a b", "json:a/b", "None", "json:" + "x" * 65])
def test_another_source_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|not a valid"):
        parse_model_source(text)


@pytest.mark.parametrize(
    ("dialect", "path", "query", "setting", "body", "value", "expected"),
    [
        ("openai", None, b"", "", {"model": "a"}, None, Named("a")),
        ("openai", None, b"", "", {}, None, Named(None)),
        ("openai", b"/openai/deployments/a/chat/completions", b"", "", {}, None, Named("a")),
        ("openai", b"/openai/deployments/a/chat/completions", b"", "", {"model": "b"}, None, Named("b", ("a",))),
        ("openai", None, b"model=b", "", {"model": "a"}, None, Named("a", ("b",))),
        ("openai", None, b"m=b", "query:m", {"model": "a"}, None, Named("b", ("a",))),
        ("openai", None, b"", "json:engine", {"model": "a", "engine": "b"}, None, Named("b", ("a",))),
        ("openai", None, b"", "header:X-Model", {"model": "a"}, "b", Named("b", ("a",))),
        ("gemini", None, b"", "", {"model": "a"}, None, Named("gemini-2.5-flash", ("a",))),
        ("bedrock", None, b"", "", {}, None, Named("amazon.nova-lite-v1:0")),
        ("openai", None, b"", "none", {"model": "a"}, None, Named("a")),
        ("header", None, b"", "path:m", {}, "x", Named("x")),
    ],
)  # fmt: skip
def test_the_model_is_that_of_the_route_s_source(
    dialect: str, path: bytes | None, query: bytes, setting: str, body: dict[str, Any], value: str | None,
    expected: Named,
) -> None:  # fmt: skip
    source = parse_model_source(setting)
    found = facts(body, dialect, path, model_member=source.json_member)
    where = PATHS[dialect] if path is None else path
    assert named_models(source, DIALECTS[dialect], found, path=where, query=query, value=value) == expected


@pytest.mark.parametrize(
    ("named", "is_refused"),
    [
        (Named("a", ("a-1",)), False), (Named("a", ("unlisted",)), False), (Named("a", ("b",)), True),
        (Named("unlisted", ("b",)), True), (Named(None, ("b",)), True), (Named(None), False),
    ],
)  # fmt: skip
def test_a_second_place_that_names_another_row_is_refused(named: Named, is_refused: bool) -> None:
    if not is_refused:
        candidates_of(TABLE, named)
        return
    with pytest.raises(Refusal) as caught:
        candidates_of(TABLE, named)
    assert (caught.value.reason, caught.value.field) == (Reason.REQUEST_MALFORMED, "model")


def test_alternatives_are_candidates_in_order() -> None:
    found = candidates_of(TABLE, Named("a"), ("b", "unlisted"))
    assert [None if model is None else model.name for model in found.models] == ["a", "b", None]


@pytest.mark.parametrize(
    ("query", "value"),
    [(b"", None), (b"m=a", "a"), (b"x=1&m=a+b%20c", "a b c"), (b"x;y&m=a", "a"), (b"m", ""), (b"m%6d=a", None),
     (b"%6d=a", "a"), (b"m2=a&n=b", None)],
)  # fmt: skip
def test_a_query_parameter_is_decoded_once(query: bytes, value: str | None) -> None:
    assert query_value(query, "m") == value


@pytest.mark.parametrize(
    "query", [b"m=a&m=a", b"m%ff=a", b"m=a&M=b", b"M=b", b"m[]=a", b"m%00=a", b"+m=a", b"&" * 2_000, b"x;m=a", b"m=a;x"]
)
def test_a_query_parameter_stands_once_in_one_spelling(query: bytes) -> None:
    with pytest.raises(Refusal):
        query_value(query, "m")
