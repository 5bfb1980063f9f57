"""The models of requests that name the same are kept: the result is the same as without."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from keyproxy.ai.dialects.table import DIALECTS, endpoint_of
from keyproxy.ai.model_source import parse_model_source
from keyproxy.ai.models import Model, ModelTable, price_of
from keyproxy.ai.requests.request_facts import RequestFacts
from keyproxy.ai.requests.request_reading import BodyBounds, RequestReading
from keyproxy.ai.reservation import TokenRules
from keyproxy.ai.route_rules import RouteRules
from keyproxy.http.headers import FieldNames
from keyproxy.http_messages import RequestHead
from keyproxy.reasons import Refusal
from keyproxy.wire.parsing.head_cache import RequestReader

TABLE = ModelTable([Model("a", ("a-1",), price=price_of(1, 2)), Model("b"), Model("g", ("gemini-2.5-flash",))])

TARGETS = [
    "/v1/chat/completions", "/v1/chat/completions?model=b", "/v1/chat/completions?m=a-1", "/v1/chat/completions?model=x",
    "/openai/deployments/a/chat/completions", "/v1beta/models/gemini-2.5-flash:generateContent", "/v1/models/b/run",
]  # fmt: skip
NAMES = st.sampled_from(["a", "a-1", "b", "x", "y" * 300, "not recordable "])
BODIES = st.fixed_dictionaries(
    {}, optional={"model": NAMES, "engine": NAMES, "models": st.lists(NAMES, max_size=2), "fallbacks": st.lists(NAMES)}
)


def rules_of(dialect: str, source: str) -> RouteRules:
    placeholder = re.compile(rb"/v1/models/([^/]+)/run") if source.startswith("path:") else None
    return RouteRules(
        "r", DIALECTS[dialect], tokens=TokenRules(), bounds=BodyBounds(), models=TABLE,
        source=parse_model_source(source), placeholder=placeholder, model_field=b"X-Keyproxy-Model: ",
    )  # fmt: skip


def head_of(target: str, model: str | None) -> RequestHead:
    field = "" if model is None else f"X-Model: {model.strip()}\r\n"
    raw = f"POST {target} HTTP/1.1\r\nHost: p\r\n{field}\r\n".encode()
    return RequestReader(FieldNames(), lambda _: False).read(raw, len(raw) - 4)


def facts_of(rules: RouteRules, head: RequestHead, body: dict[str, Any]) -> RequestFacts:
    row = endpoint_of(rules.dialect, b"POST", head.line.path)
    reading = RequestReading(rules.reading, row, head.fields, json.dumps(body).encode())
    while not reading.advance():
        pass
    assert reading.facts is not None
    return reading.facts


def named(rules: RouteRules, head: RequestHead, facts: RequestFacts) -> tuple[object, ...]:
    """The models of a request, or the message of the refusal."""
    try:
        found = rules.models_of(head, facts)
    except Refusal as refusal:
        return refusal.reason, refusal.caller_text
    return found.model, found.names, found.line, [one and one.name for one in found.candidates.models]


@settings(max_examples=300)
@given(
    dialect=st.sampled_from(["openai", "gemini", "header"]),
    source=st.sampled_from(["", "json:engine", "path:model", "query:m", "header:X-Model", "none"]),
    asked=st.lists(st.tuples(st.sampled_from(TARGETS), BODIES, st.none() | NAMES), min_size=2, max_size=6),
)
def test_models_of_a_request_do_not_depend_on_earlier_requests(
    dialect: str, source: str, asked: list[tuple[str, dict[str, Any], str | None]]
) -> None:
    rules = rules_of(dialect, source)
    for target, body, model in asked:
        head = head_of(target, model)
        facts = facts_of(rules, head, body)
        assert named(rules, head, facts) == named(rules_of(dialect, source), head, facts)


def test_kept_models_are_bounded_in_number_and_length() -> None:
    rules = rules_of("openai", "")
    for number in range(1_100):
        head = head_of(f"/v1/chat/completions/{number}", None)
        assert rules.models_of(head, facts_of(rules, head, {"model": "a"})).model == "a"
        assert rules.kept_count <= 1_024
    rules, head = rules_of("openai", ""), head_of("/v1/chat/completions", None)
    rules.models_of(head, facts_of(rules, head, {"model": "y" * 300}))
    assert rules.kept_count == 0
