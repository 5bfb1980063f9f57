"""A configuration of prompt categories that contradicts itself is refused, with the key and the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from keyproxy.config import loader
from keyproxy.config.categories import CATEGORIES_MAX, PATTERN_BYTES_MAX, PATTERNS_MAX
from keyproxy.config.loader import ConfigError
from keyproxy.config.schema import Settings

Load = Callable[[str], Settings]

ROW = '[[categories]]\nname = "code"\n'


def route(keys: str) -> str:
    return f'{ROW}[[routes]]\nmatch = "POST /v1/chat"\n{keys}'


def rows(count: int) -> str:
    return "".join(f'[[categories]]\nname = "c{number}"\n' for number in range(count))


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loaded(text: str) -> Settings:
        path = tmp_path / "keyproxy.toml"
        path.write_text(text, encoding="utf-8")
        return loader.load(path, {}).settings

    return loaded


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        (ROW + ROW, "categories[2].name", "already the name of categories[1]"),
        ("[[categories]]", "categories[1].name", "must be"),
        ('[[categories]]\nname = "Code"', "categories[1].name", "must be"),
        ('[[categories]]\nname = "1code"', "categories[1].name", "must be"),
        ('[[categories]]\nname = "a b"', "categories[1].name", "must be"),
        (f'[[categories]]\nname = "{"a" * 65}"', "categories[1].name", "must be"),
        (f'{ROW}scopes = ["a b"]', "categories[1].scopes", "must be"),
        (f'{ROW}scopes = "a"', "categories[1].scopes", "must be"),
        (f'{ROW}patterns = "a"', "categories[1].patterns", "must be"),
        (f'{ROW}patterns = [""]', "categories[1].patterns", "must be"),
        (f'{ROW}patterns = ["{"a" * (PATTERN_BYTES_MAX + 1)}"]', "categories[1].patterns", "1024 bytes"),
        (f'{ROW}patterns = ["{"é" * (PATTERN_BYTES_MAX // 2)}a"]', "categories[1].patterns", "1024 bytes"),
        (f"{ROW}patterns = {['a'] * (PATTERNS_MAX + 1)}", "categories", "201 patterns"),
        (f"{ROW}pattern = 'a'", "categories[1].pattern", "did you mean patterns?"),
        (rows(CATEGORIES_MAX + 1), "categories", "at most 64"),
        ('[categories]\nname = "code"', "categories", "[[categories]]"),
        (route('category = "=other"'), "routes[1].category", "no row of [[categories]] has the name 'other'"),
        (route('category = ["=code", "=other"]'), "routes[1].category", "'other'"),
        (route('category = "code"'), "routes[1].category", "must be =NAME"),
        (route('category = "query:x"'), "routes[1].category", "must be =NAME"),
        (route('category = "json:x"'), "routes[1].category", "JSON pointer"),
        (route('category = ["=code", 7]'), "routes[1].category", "list of strings"),
        (route("category = 0"), "routes[1].category", "list of strings"),
        (route('prompt = "cohere"'), "routes[1].prompt", "must be"),
        (route('category = "template"'), "routes[1].prompt", "is required"),
        (route('category = ["=code", "patterns"]'), "routes[1].prompt", "is required"),
        (route('category = "patterns"\nprompt = "openai"'), "routes[1].category", "another source"),
        (route('category = ["patterns", "patterns"]\nprompt = "openai"'), "routes[1].category", "another source"),
        (route('category = "=code"\nunregistered = "code"'), "routes[1].unregistered", "has no effect"),
        (route('unregistered = "code"'), "routes[1].unregistered", "has no effect"),
        (
            route('category = "template"\nprompt = "openai"\nunregistered = "other"'),
            "routes[1].unregistered",
            "no row of [[categories]] has the name 'other'",
        ),
        (
            route('category = "template"\nprompt = "openai"\nunregistered = "Code"'),
            "routes[1].unregistered",
            "not a valid name",
        ),
    ],
)
def test_a_contradiction_is_refused_with_its_key_and_reason(load: Load, text: str, key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(text)
    assert any(problem.startswith(f"{key}: ") and reason in problem for problem in error.value.problems), str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        rows(CATEGORIES_MAX),
        f'[[categories]]\nname = "{"a" * 64}"',
        f"{ROW}patterns = {['a'] * PATTERNS_MAX}",
        f'{ROW}patterns = ["{"é" * (PATTERN_BYTES_MAX // 2)}"]',
        route('category = ""'),
        route("category = []"),
        route('category = "=code"'),
        route('category = ["=code", "header:X-Kind", "json:/metadata/kind"]'),
        route('category = "template"\nprompt = "anthropic"'),
        route('category = "template"\nprompt = "gemini"\nunregistered = "code"'),
        route('category = ["template", "patterns"]\nprompt = "openai"'),
    ],
)
def test_the_other_side_of_each_edge_is_accepted(load: Load, text: str) -> None:
    load(text)


def test_a_row_is_read_with_its_defaults(load: Load) -> None:
    settings = load(f"{ROW}scopes = ['prompt:code']\npatterns = ['(?i)refactor']\n[[categories]]\nname = 'chat'")
    assert [(one.name, one.scopes, one.patterns) for one in settings.categories] == [
        ("code", frozenset({"prompt:code"}), ("(?i)refactor",)),
        ("chat", frozenset(), ()),
    ]


@pytest.mark.parametrize(
    ("value", "sources"), [('""', []), ('"=code"', ["=code"]), ('["=code", "header:X"]', ["=code", "header:X"])]
)
def test_category_is_one_source_or_several(load: Load, value: str, sources: list[str]) -> None:
    assert load(route(f"category = {value}")).routes[0].category == sources
