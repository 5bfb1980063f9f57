"""Routes that the proxy responds to itself: what contradicts this is refused, with the key and the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from keyproxy.config import loader
from keyproxy.config.loader import ConfigError
from keyproxy.config.schema import Settings

SCOPES = 'scopes = ["agents:mint"]\n'
SERVES = 'serves = "agent-tokens"\n'
PATTERNS = '[[categories]]\nname = "code"\n'


def mint(*lines: str, match: str = "POST /v1/agent-tokens", scopes: str = SCOPES) -> str:
    return f'[[routes]]\nmatch = "{match}"\n{scopes}{SERVES}{"".join(lines)}\n'


def load(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "keyproxy.toml"
    path.write_text(text, encoding="utf-8")
    return loader.load(path, {}).settings


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    return error.value.problems


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        (mint().replace('"agent-tokens"', '"tokens"'), "serves", "must be '' or 'agent-tokens'"),
        (mint(match="GET /v1/agent-tokens"), "serves", "needs the method POST in match"),
        (mint(match="PUT /v1/agent-tokens"), "serves", "needs the method POST in match"),
        (mint(match="* /v1/agent-tokens"), "serves", "needs the method POST in match"),
        (mint(match="POST /v1/{name}"), "serves", "needs a match without placeholders"),
        (mint(match="POST /v1/{rest...}"), "serves", "needs a match without placeholders"),
        (mint(scopes=""), "serves", "needs 'agents:mint' in scopes"),
        (mint(scopes='scopes = ["jobs:write"]\n'), "serves", "needs 'agents:mint' in scopes"),
        (mint('tokens = "openai"\n'), "tokens", "must not be set with serves"),
        (mint('model = "json:model"\n'), "model", "must not be set with serves"),
        (mint('model = "none"\n'), "model", "must not be set with serves"),
        (mint('idempotency = "off"\n'), "idempotency", "must not be set with serves"),
        (mint('binds = [{ value = "json:/agent", is = "{user}" }]\n'), "binds", "must not be set with serves"),
        (PATTERNS + mint('category = "=code"\n'), "category", "must not be set with serves"),
        (mint('prompt = "openai"\n'), "prompt", "must not be set with serves"),
        (mint('access = "public"\n'), "access", "must not be set with serves"),
    ],
)  # fmt: skip
def test_contradiction_is_refused_with_its_key_and_reason(tmp_path: Path, text: str, key: str, reason: str) -> None:
    found = [one for one in problems(tmp_path, text) if one.startswith(f"routes[1].{key}: ")]
    assert any(reason in one for one in found), found


def test_every_contradiction_of_one_route_is_reported(tmp_path: Path) -> None:
    text = mint('model = "none"\n', match="GET /v1/{name}", scopes="")
    assert [one.partition(":")[0] for one in problems(tmp_path, text)] == ["routes[1].serves"] * 3 + ["routes[1].model"]


def test_route_that_mints_may_need_more_scopes_and_have_a_name_and_an_error_shape(tmp_path: Path) -> None:
    more = 'scopes = ["agents:mint", "jobs:write"]\n'
    settings = load(tmp_path, mint('name = "mint"\n', 'error_shape = "openai"\n', scopes=more))
    ((_, route),) = settings.route_table().rows
    assert (route.serves, route.name, route.error_shape, route.deduplicates) == (
        "agent-tokens",
        "mint",
        "openai",
        False,
    )


def test_config_check_exits_2_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "keyproxy.toml"
    path.write_text(mint(scopes=""), encoding="utf-8")
    command = [sys.executable, "-m", "keyproxy", "config", "check", "--offline", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "routes[1].serves: 'agent-tokens' needs 'agents:mint' in scopes" in done.stderr
