"""Public routes and encoded slashes: a configuration that contradicts itself is refused, with the key and the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from keyproxy.config import loader
from keyproxy.config.loader import ConfigError
from keyproxy.config.schema import Settings

PUBLIC = 'access = "public"\n'
FORWARD = 'encoded_slash = "forward"\n'


def route(match: str, *lines: str) -> str:
    return f'[[routes]]\nmatch = "{match}"\n{"".join(lines)}\n'


KEYED = route("POST /v1/ai/jobs", 'scopes = ["jobs:write"]\n')


def load(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "keyproxy.toml"
    path.write_text(text, encoding="utf-8")
    return loader.load(path, {}).settings


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        (route("GET /a", 'access = "open"\n'), "routes[1].access", "must be 'key' or 'public'"),
        (route("GET /a", 'encoded_slash = "allow"\n'), "routes[1].encoded_slash", "must be 'refuse' or 'forward'"),
        (KEYED + route("GET /a", PUBLIC, 'scopes = ["x"]\n'), "routes[2].scopes", "access = 'public'"),
        (route("GET /a", PUBLIC, 'tokens = "openai"\n'), "routes[1].tokens", "access = 'public'"),
        (route("GET /{a}", PUBLIC, FORWARD), "routes[1].encoded_slash", "access = 'public'"),
        (route("GET /{a}", PUBLIC, 'model = "path:a"\n'), "routes[1].model", "access = 'public'"),
        (route("GET /a", PUBLIC, 'model = "none"\n'), "routes[1].model", "access = 'public'"),
        (route("* /{rest...}", PUBLIC) + KEYED, "routes[1].access", "also apply to routes[2] 'POST /v1/ai/jobs'"),
        (route("POST /v1/ai/{x}", PUBLIC) + route("GET /b") + KEYED, "routes[1].access", "routes[3]"),
        (route("POST /m/{x}", PUBLIC) + route("POST /m/{x}:run"), "routes[1].access", "routes[2]"),
        (route("GET /a/b", FORWARD), "routes[1].encoded_slash", "needs a placeholder in match"),
        ("[identity]\nforward_overrides = 1\n", "identity.forward_overrides", ""),
        (route("GET /{a}b{c}"), "routes[1].match", "text after it"),
        (route("GET /{a...}b"), "routes[1].match", "must be the last segment"),
        (route("GET /{a}/{a}"), "routes[1].match", "two placeholders of one name"),
    ],
)
def test_contradiction_is_refused_with_its_key_and_reason(tmp_path: Path, text: str, key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    problem = error.value.problems[0]
    assert problem.startswith(f"{key}: ")
    assert reason in problem
    command = [
        sys.executable,
        "-m",
        "keyproxy",
        "config",
        "check",
        "--offline",
        "--config",
        str(tmp_path / "keyproxy.toml"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert problem in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        route("GET /healthz", PUBLIC, 'name = "health"\nerror_shape = "openai"\n') + KEYED,
        KEYED + route("* /{rest...}", PUBLIC),
        route("OPTIONS /{rest...}", PUBLIC) + KEYED,
        route("POST /v1/ai/{x}:run", PUBLIC) + KEYED,
        route("* /{rest...}", PUBLIC) + route("GET /a", PUBLIC),
        route("GET /{a}:run", FORWARD),
        route("GET /{rest...}", FORWARD),
    ],
)
def test_a_configuration_without_contradiction_loads(tmp_path: Path, text: str) -> None:
    table = load(tmp_path, text).route_table()
    assert table.has_public is ("public" in text)
    assert table.forwards_encoded_slash is ("forward" in text)


def test_by_default_routes_need_a_key_and_refuse_encoded_slashes(tmp_path: Path) -> None:
    settings = load(tmp_path, KEYED)
    assert not settings.identity.forward_overrides
    ((_, only),) = settings.route_table().rows
    assert (only.is_public, only.forwards_encoded_slash) == (False, False)
