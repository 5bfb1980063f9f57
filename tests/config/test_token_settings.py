"""A configuration of models, tokens and caps that contradicts itself is refused, with the key and the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from keyproxy.ai.models import Model, Price
from keyproxy.cli.commands.config import config_group
from keyproxy.config import loader
from keyproxy.config.loader import ConfigError
from keyproxy.config.models import MODELS_MAX
from keyproxy.config.schema import Settings

Load = Callable[[str], Settings]

PRICED = "input_micros_per_million = 2500000\noutput_micros_per_million = 10000000\n"
MODEL = '[[models]]\nname = "a"\n'
ROUTE = '[[routes]]\nmatch = "POST /v1/{model}"\ntokens = "openai"\n'


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loaded(text: str) -> Settings:
        path = tmp_path / "keyproxy.toml"
        path.write_text(text, encoding="utf-8")
        return loader.load(path, {}).settings

    return loaded


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f'{MODEL}{MODEL}', "models[2]"),
        (f'{MODEL}[[models]]\nname = "b"\naliases = ["a"]', "models[2]"),
        ('[[models]]\nname = "b"\naliases = ["c", "c"]', "models[1]"),
        ('[[models]]\nname = "b"\naliases = ["b"]', "models[1]"),
        (f"{MODEL}input_micros_per_million = 1", "models[1].output_micros_per_million"),
        (f"{MODEL}output_micros_per_million = 1", "models[1].input_micros_per_million"),
        (f"{MODEL}cached_input_micros_per_million = 1", "models[1].input_micros_per_million"),
        (f"{MODEL}reasoning_micros_per_million = 1\ninput_micros_per_million = 1",
         "models[1].output_micros_per_million"),
        (f"{MODEL}{PRICED}cache_write_micros_per_million = -1", "models[1].cache_write_micros_per_million"),
        (f"{MODEL}{PRICED}cache_write_micros_per_million = 1000000000001", "models[1].cache_write_micros_per_million"),
        (f"{MODEL}{PRICED}cache_write_micros_per_million = 1.5", "models[1].cache_write_micros_per_million"),
        (f"{MODEL}output_tokens_max = -1", "models[1].output_tokens_max"),
        (f"{MODEL}image_tokens = true", "models[1].image_tokens"),
        (f'{MODEL}reasoning = "yes"', "models[1].reasoning"),
        (f'{MODEL}scopes = ["a b"]', "models[1].scopes"),
        (f'{MODEL}aliases = "b"', "models[1].aliases"),
        (f"{MODEL}price = 1", "models[1].price"),
        ('[[models]]\nname = "a b"', "models[1].name"),
        ("[[models]]\nscopes = []", "models[1].name"),
        ("[models]\nname = 1", "models"),
        ("".join(f'[[models]]\nname = "m{number}"\n' for number in range(MODELS_MAX + 1)), "models"),
        ('[[routes]]\nmatch = "* /a"\ntokens = "cohere"', "routes[1].tokens"),
        (f'{ROUTE}cap = "maybe"', "routes[1].cap"),
        (f'{ROUTE}cap_field = "max_length"', "routes[1].cap_field"),
        (f'{ROUTE}cap_field = "maxOutputTokens"', "routes[1].cap_field"),
        (f'{ROUTE}idempotency = "twice"', "routes[1].idempotency"),
        (f'{ROUTE}model = "body:model"', "routes[1].model"),
        (f'{ROUTE}model = "path:name"', "routes[1].model"),
        (f'{ROUTE}name = "a,b"', "routes[1].name"),
        ('[[routes]]\nmatch = "* /a"\ncap = "insert"', "routes[1].cap"),
        ('[[routes]]\nmatch = "* /a"\ntokens = "none"\ncap = "off"', "routes[1].cap"),
        ('[[routes]]\nmatch = "* /a"\ntokens = "header"\ncap = "refuse"', "routes[1].cap"),
        ("[tokens]\noutput_min = 17\noutput_default = 16", "tokens.output_min"),
        ("[tokens]\nbody_bytes_max = 1000000\nbody_memory_max = 3999999", "tokens.body_memory_max"),
        ('[tokens]\ninput_bound = "words"', "tokens.input_bound"),
        ("[tokens]\njson_depth_max = 0", "tokens.json_depth_max"),
        ("[tokens]\noutput_max = 5", "tokens.output_max"),
        ('[money]\nunit = ""', "money.unit"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_by_key(load: Load, text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert [problem for problem in caught.value.problems if problem.startswith(f"{key}:")], caught.value.problems


@pytest.mark.parametrize(
    "text",
    [
        "".join(f'[[models]]\nname = "m{number}"\n' for number in range(MODELS_MAX)),
        f"{MODEL}{PRICED}cache_write_micros_per_million = 1000000000000\ncached_input_micros_per_million = 0",
        "[tokens]\noutput_min = 16\noutput_default = 16",
        "[tokens]\nbody_bytes_max = 1000000\nbody_memory_max = 4000000",
        f'{ROUTE}model = "path:model"\ncap_field = "max_tokens"\ncap = "refuse"\nidempotency = "off"\nname = "chat"',
        '[[routes]]\nmatch = "POST /v1/{rest...}"\nmodel = "path:rest"\ntokens = "header"',
        *[f'[[routes]]\nmatch = "* /a"\ntokens = "{name}"' for name in
          ("none", "openai", "anthropic", "gemini", "ollama", "bedrock", "header")],
    ],
)  # fmt: skip
def test_the_other_side_of_each_edge_is_accepted(load: Load, text: str) -> None:
    load(text)


def test_a_model_is_read_with_its_defaults(load: Load) -> None:
    (plain,) = load(MODEL).models
    assert (plain.name, plain.price, plain.reasons, plain.output_tokens_max) == ("a", None, False, 0)
    (priced,) = load(f'{MODEL}{PRICED}aliases = ["b"]\nscopes = ["x:y"]\nreasoning = true\nimage_tokens = 7').models
    assert isinstance(priced, Model)
    assert isinstance(priced.price, Price)
    assert (priced.aliases, priced.scopes, priced.reasons, priced.image_tokens) == (
        ("b",), frozenset({"x:y"}), True, 7,
    )  # fmt: skip
    assert (priced.price.cached_input, priced.price.cache_write, priced.price.reasoning) == (
        2_500_000, 2_500_000, 10_000_000,
    )  # fmt: skip


def test_the_settings_reach_the_rules(load: Load) -> None:
    tokens = load('[tokens]\ninput_bound = "bytes"\noutput_min = 1\njson_depth_max = 9\ninflate_ratio_max = 7').tokens
    assert (tokens.rules().input_bound, tokens.rules().output_min) == ("bytes", 1)
    assert (tokens.bounds().json.depth_max, tokens.bounds().inflate_ratio_max) == (9, 7)


@pytest.mark.parametrize(("cap", "warns"), [("off", True), ("insert", False), ("refuse", False)])
def test_config_check_warns_of_a_route_without_caps(tmp_path: Path, cap: str, warns: bool) -> None:
    path = tmp_path / "keyproxy.toml"
    path.write_text(f'{ROUTE}cap = "{cap}"\n', encoding="utf-8")
    result = CliRunner().invoke(config_group, ["check", "--offline", "--config", str(path)])
    assert result.exit_code == 0, result.output
    assert ("routes[1]: cap = 'off'" in result.output) is warns


def test_a_route_is_named_by_its_name_or_its_match(load: Load) -> None:
    for text, name in ((ROUTE, "POST /v1/{model}"), (f'{ROUTE}name = "chat"', "chat")):
        route = load(text).route_table().match(b"POST", b"/v1/x")
        assert route is not None
        assert route.name == name
