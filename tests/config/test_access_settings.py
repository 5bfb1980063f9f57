"""Which routes judge what, and which binds and sources the configuration accepts."""

from __future__ import annotations

from typing import Any

import pytest

from keyproxy.ai.models import Model
from keyproxy.config import loader
from keyproxy.config.access_settings import access_rules, judges_model, model_warnings
from keyproxy.config.bind_settings import binds_fault, place_faults, read_binds
from keyproxy.config.schema import RouteRow, Settings

FREE, SCOPED = Model("free"), Model("scoped", (), frozenset({"model:x"}))
HERE = {"value": "path:c"}


@pytest.mark.parametrize(
    ("tokens", "model", "models", "judges"),
    [
        ("openai", "", [FREE], False), ("openai", "", [FREE, SCOPED], True), ("openai", "none", [SCOPED], False),
        ("openai", "json:engine", [], True), ("none", "", [SCOPED], False), ("none", "query:m", [], True),
        ("none", "none", [SCOPED], False), ("gemini", "", [SCOPED], True), ("header", "", [SCOPED], False),
        ("header", "header:X-Model", [FREE], True), ("none", "form:model", [], True),
    ],
)  # fmt: skip
def test_a_route_judges_the_model_if_it_names_a_place_or_a_model_is_restricted(
    tokens: str, model: str, models: list[Model], judges: bool
) -> None:
    row = RouteRow("POST /x", tokens=tokens, model=model)
    assert judges_model(row, models) == judges
    settings = Settings(models=tuple(models), routes=(row,))
    assert len(access_rules(settings, settings.route_table(), None)) == judges


def test_a_route_that_is_opened_again_is_warned_about() -> None:
    rows = (
        RouteRow("POST /a", tokens="openai", model="none"), RouteRow("POST /b", tokens="openai"),
        RouteRow("POST /c", model="none"),
    )  # fmt: skip
    (warning,) = model_warnings(Settings(models=(SCOPED,), routes=rows))
    assert warning.startswith("routes[1]: model = 'none'")
    assert model_warnings(Settings(models=(FREE,), routes=rows)) == []


@pytest.mark.parametrize(
    "bind",
    [
        {**HERE, "is": "{tenant}"}, {**HERE, "starts": "{tenant}/"}, {**HERE, "starts": "x/{tenant}/{user}/"},
        {**HERE, "is": "{tenant}~{key}"}, {**HERE, "owned": "collection"}, {**HERE, "is": "{user}", "missing": "allow"},
        {"value": "query:c", "is": "{tenant}"}, {"value": "header:X-C", "is": "{tenant}"},
        {"value": "json:/a/*/b", "is": "{tenant}", "missing": "refuse"}, {**HERE, "starts": "t={tenant},"},
    ],
)  # fmt: skip
def test_a_bind_is_accepted(bind: dict[str, str]) -> None:
    assert binds_fault([bind]) is None
    (read,) = read_binds([bind])
    assert (read.source.text, read.accepts_missing) == (bind["value"], bind.get("missing") == "allow")
    assert place_faults("* /{c...}", [read], "X-Keyproxy-") == []


@pytest.mark.parametrize(
    ("bind", "fault"),
    [
        ({**HERE}, "exactly one of"), ({**HERE, "is": "{tenant}", "owned": "x"}, "exactly one of"),
        ({"is": "{tenant}"}, "has no value"), ({**HERE, "equals": "x"}, "no key 'equals'"),
        ({"value": "c", "is": "{tenant}"}, "must be path:NAME"), ({"value": "form:c", "is": "{tenant}"}, "must be path"),
        ({"value": "json:a", "is": "{tenant}"}, "JSON pointer"), ({"value": "json:/", "is": "{tenant}"}, "JSON pointer"),
        ({"value": "json:/*", "is": "{tenant}"}, "selects no member"),
        ({"value": "json:/a~2", "is": "{tenant}"}, "JSON pointer"),
        ({"value": "query:a b", "is": "{tenant}"}, "valid name"),
        ({"value": "header:a_b", "is": "{tenant}"}, "valid name"),
        ({**HERE, "is": "acme"}, "no placeholder"), ({**HERE, "starts": "docs/"}, "no placeholder"),
        ({**HERE, "starts": "{tenant}-"}, "continue with one of"),
        ({**HERE, "starts": "{tenant}"}, "continue with one of"),
        ({**HERE, "is": "{tenant}.x"}, "continue with one of"),
        ({**HERE, "is": "{tenant}{user}"}, "continue with one of"),
        ({**HERE, "is": "{team}"}, "unknown placeholder"), ({**HERE, "is": "{tenant"}, "unknown placeholder"),
        ({**HERE, "is": "{tenant}/ x"}, "no bound value"), ({**HERE, "owned": "A"}, "kind of ids"),
        ({**HERE, "is": "{tenant}", "missing": "maybe"}, "missing: must be"),
    ],
)  # fmt: skip
def test_a_bind_that_cannot_hold_what_it_says_is_a_fault(bind: dict[str, str], fault: str) -> None:
    found = binds_fault([{**HERE, "is": "{tenant}"}, bind])
    assert found is not None
    assert found.startswith("bind 2: ")
    assert fault in found


@pytest.mark.parametrize(
    ("match", "bind", "fault"),
    [
        ("* /x", {**HERE, "is": "{tenant}"}, "needs the placeholder {c}"),
        ("* /{c}/{c}", {**HERE, "is": "{tenant}"}, "occurs in match 2 times"),
        ("* /x", {"value": "header:Authorization", "is": "{tenant}"}, "not forwarded"),
        ("* /x", {"value": "header:X-Keyproxy-Tenant", "is": "{tenant}"}, "not forwarded"),
        ("* /x", {"value": "header:Connection", "is": "{tenant}"}, "not forwarded"),
    ],
)
def test_a_bound_value_must_stand_where_it_is_forwarded(match: str, bind: dict[str, str], fault: str) -> None:
    (found,) = place_faults(match, read_binds([bind]), "X-Keyproxy-")
    assert fault in found


@pytest.mark.parametrize(
    ("routes", "fault"),
    [
        ('[{"match": "* /x", "binds": [{"value": "path:c", "is": "{tenant}"}]}]', "routes[1].binds: bind 1: 'path:c'"),
        ('[{"match": "* /x", "binds": {"value": "path:c"}}]', "routes[1].binds: must be a list of inline tables"),
        ('[{"match": "* /x", "binds": [{"value": 1}]}]', "routes[1].binds: must be a list of inline tables"),
        ('[{"match": "* /x", "model": "path:m"}]', "routes[1].model"),
        ('[{"match": "* /x", "model": "header:Authorization"}]', "routes[1].model"),
        ('[{"match": "* /x", "category": "header:X-Keyproxy-Kind"}]', "routes[1].category"),
    ],
)
def test_the_faults_name_the_route_and_the_key(routes: str, fault: str) -> None:
    with pytest.raises(loader.ConfigError) as caught:
        loader.load(None, {"KEYPROXY_ROUTES": routes})
    assert any(fault in problem for problem in caught.value.problems), caught.value.problems


def test_binds_are_read_from_a_file(tmp_path: Any) -> None:
    file = tmp_path / "keyproxy.toml"
    file.write_text(
        '[[routes]]\nmatch = "* /c/{c...}"\nbinds = [{ value = "path:c", starts = "{tenant}/" }]\n', encoding="utf-8"
    )
    settings = loader.load(file, {}).settings
    (rules,) = access_rules(settings, settings.route_table(), None).values()
    assert [bind.text for bind in rules.binds] == ["{tenant}/"]
