"""A review of the route table: routes that never match, and keys that no route accepts."""

from __future__ import annotations

import pytest

from keyproxy.ai.categories import Category
from keyproxy.ai.models import Model
from keyproxy.config.route_review import scope_warnings, shadowed
from keyproxy.config.schema import RouteRow, Settings
from keyproxy.config.tools.tool_settings import ToolRow


@pytest.mark.parametrize(
    ("earlier", "later", "is_shadowed"),
    [
        ("* /v1/{rest...}", "POST /v1/jobs", True),
        ("* /v1/{rest...}", "POST /v1/", True),
        ("* /v1/{rest...}", "POST /v1", False),
        ("* /v1/{rest...}", "GET /v1/jobs/{id}", True),
        ("* /v1/{rest...}", "GET /v1/jobs/{more...}", True),
        ("* /v1/{rest...}", "GET /v2/jobs", False),
        ("* /v1/jobs/{rest...}", "GET /v1/{rest...}", False),
        ("* /v1/jobs/{rest...}", "GET /v1/{name}/x", False),
        ("* /{rest...}", "GET /", True),
        ("GET /v1/{rest...}", "POST /v1/jobs", False),
        ("GET /v1/{rest...}", "* /v1/jobs", False),
        ("GET /v1/{rest...}", "GET /v1/jobs", True),
        ("GET /v1/{name}", "GET /v1/jobs", True),
        ("GET /v1/{name}", "GET /v1/{other}", True),
        ("GET /v1/{name}", "GET /v1/", False),
        ("GET /v1/{name}", "GET /v1/a/b", False),
        ("GET /v1/{name}", "GET /v1/{rest...}", False),
        ("GET /v1/jobs", "GET /v1/{name}", False),
        ("GET /v1/jobs", "* /v1/jobs", False),
        ("* /v1/jobs", "GET /v1/jobs", True),
        ("GET /a/{b}/c", "GET /a/b/c", True),
        ("GET /a/{b}/c", "GET /a/b/d", False),
        ("GET /m/{x}", "GET /m/{x}:run", True),
        ("GET /m/{x}:run", "GET /m/{x}", False),
        ("GET /m/{x}:run", "GET /m/{y}:run", True),
        ("GET /m/{x}:run", "GET /m/a:run", True),
        ("GET /m/{x}:run", "GET /m/:run", False),
        ("GET /m/{x}n", "GET /m/{x}:run", True),
        ("GET /m/{x}:run", "GET /m/{x}n", False),
        ("GET /m/{x}:run", "GET /m/{x...}", False),
    ],
)
def test_a_route_is_shadowed_by_an_earlier_one_that_matches_all_it_does(
    earlier: str, later: str, is_shadowed: bool
) -> None:
    found = shadowed([RouteRow(earlier), RouteRow(later)])
    assert bool(found) is is_shadowed
    if is_shadowed:
        assert found[0].startswith(f"routes[2]: {later!r} never matches, because routes[1] {earlier!r} precedes it")


def test_scopes_of_models_categories_and_tools_are_required() -> None:
    settings = Settings(
        routes=(RouteRow("* /mcp"),),
        models=(Model("big", scopes=frozenset({"model:premium"})),),
        categories=(Category("code", frozenset({"prompt:code"})),),
        tools=(ToolRow("search", scopes=["data:read"]),),
    )
    assert scope_warnings(settings, ["model:premium", "prompt:code", "data:read"]) == []
    assert scope_warnings(settings, ["data:raed"]) == ["no route requires the scope 'data:raed'"]


def test_each_shadowed_route_is_named_once() -> None:
    rows = [RouteRow("* /{rest...}"), RouteRow("GET /a"), RouteRow("GET /a/b")]
    assert [sentence.partition(":")[0] for sentence in shadowed(rows)] == ["routes[2]", "routes[3]"]
    assert shadowed([]) == []


@pytest.mark.parametrize(
    ("routes", "scopes", "warning"),
    [
        ([], [], None),
        ([], ["x"], None),
        ([["a"]], ["a"], None),
        ([["a"]], [], "has no scopes and every route requires one"),
        ([["a"], []], [], None),
        ([["a", "b"]], ["a"], "no route accepts a key with only these scopes"),
        ([["a", "b"]], ["a", "b"], None),
        ([["a"]], ["a", "x"], "no route requires the scope 'x'"),
    ],
)
def test_key_that_no_route_accepts_causes_a_warning(
    routes: list[list[str]], scopes: list[str], warning: str | None
) -> None:
    rows = [RouteRow(f"GET /{number}", wanted) for number, wanted in enumerate(routes)]
    found = scope_warnings(Settings(routes=tuple(rows)), scopes)
    assert len(found) == (warning is not None)
    assert warning is None or warning in found[0]
    assert "key" not in " ".join(scope_warnings(Settings(routes=tuple(rows)), scopes, "client"))
