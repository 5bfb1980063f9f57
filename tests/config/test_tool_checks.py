"""Tools, providers and signals: what their settings contradict is refused, with the key and the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from keyproxy.config import loader
from keyproxy.config.loader import ConfigError
from keyproxy.config.route_review import certificate_warnings
from keyproxy.config.schema import Settings
from keyproxy.config.tools.provider_checks import is_plaintext
from keyproxy.config.tools.tool_rules import tool_rules

SEARCH = '[[tools]]\nname = "search"\n'
MCP_ROUTE = '[[routes]]\nmatch = "* /mcp"\nprotocol = "mcp"\n'
CA = '[listen]\ntls_certificate_file = "c.pem"\ntls_client_ca_file = "ca.pem"\n'
FILE = 'secret_file = "/run/secrets/p"\n'


def tool(*lines: str, name: str = "search") -> str:
    return f'[[tools]]\nname = "{name}"\n' + "".join(f"{line}\n" for line in lines)


def route(*lines: str, match: str = "POST /v1/search") -> str:
    return f'[[routes]]\nmatch = "{match}"\n' + "".join(f"{line}\n" for line in lines)


def provider(*lines: str, name: str = "p", file: str = FILE) -> str:
    return f'[[providers]]\nname = "{name}"\n{file}' + "".join(f"{line}\n" for line in lines)


def upstream(url: str, test_url: str = "") -> str:
    return f'[upstream]\nurl = "{url}"\ntest_url = "{test_url}"\n'


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
        # names
        (tool() + tool(), "tools[2].name", "'search' is configured twice"),
        (tool() + tool('mcp = "search"', name="other"), "tools[2].mcp", "'search' is the name of tools[1]"),
        (tool('mcp = "x"') + tool('mcp = "x"', name="other"), "tools[2].mcp", "'x' is the name of tools[1]"),
        (tool(name="a b"), "tools[1].name", "must have 1 to 128"),
        (tool(name=""), "tools[1].name", "must have 1 to 128"),
        (tool(name="x" * 129), "tools[1].name", "must have 1 to 128"),
        (tool(name="caf\u00e9"), "tools[1].name", "must have 1 to 128"),
        (tool('mcp = "a/b"'), "tools[1].mcp", "must have 1 to 128"),
        (tool('mcp = "a\\n"'), "tools[1].mcp", "must have 1 to 128"),
        (provider() + provider(), "providers[2].name", "'p' is configured twice"),
        (provider(name="a b"), "providers[1].name", "must have 1 to 128"),
        # unknown values
        (tool('approval = "maybe"'), "tools[1].approval", "must be 'none' or 'consent' or 'human' or 'admin'"),
        (tool('credentials = ["jwt"]'), "tools[1].credentials", "unknown kind 'jwt'"),
        (tool('scopes = ["a b"]'), "tools[1].scopes", "not a valid scope"),
        (SEARCH + route('tool = "find"'), "routes[1].tool", "there is no tool 'find'"),
        (route('provider = "p"'), "routes[1].provider", "there is no provider 'p'"),
        ('[anomalies]\nwatch = ["theft"]\n', "anomalies.watch", "unknown signal 'theft'"),
        ('[anomalies]\nsuspend = ["theft"]\n', "anomalies.suspend", "unknown signal 'theft'"),
        ('[mcp]\nversions = ["2024-11-05"]\n', "mcp.versions", "unknown version '2024-11-05'"),
        # routes
        (SEARCH + MCP_ROUTE + 'tool = "search"\n', "routes[1].tool", "must not be set with protocol"),
        (MCP_ROUTE, "routes[1].protocol", "'mcp' needs [[tools]]"),
        (SEARCH + MCP_ROUTE + 'access = "public"\n', "routes[1].protocol", "must not be set with access = 'public'"),
        (SEARCH + route('tool = "search"', 'access = "public"'), "routes[1].tool", "access = 'public'"),
        (provider() + route('provider = "p"', 'access = "public"'), "routes[1].provider", "access = 'public'"),
        (SEARCH + route('error_shape = "mcp"'), "routes[1].error_shape", "needs protocol = 'mcp'"),
        (route("filter_tools_list = true"), "routes[1].filter_tools_list", "needs protocol = 'mcp'"),
        (SEARCH + route('tool = "search"', 'serves = "agent-tokens"'), "routes[1].tool", "nothing goes upstream"),
        # what can never hold
        ('[listen]\ntls_client_certificate = "optional"\n', "listen.tls_client_certificate",
         "without listen.tls_client_ca_file"),
        (tool("client_certificate = true"), "tools[1].client_certificate", "needs listen.tls_client_ca_file"),
        (tool('credentials = ["oauth"]'), "tools[1].credentials", "no credential of the kind 'oauth' can occur without"),
        # providers
        (provider('format = "Bearer"'), "providers[1].format", "exactly one {secret}"),
        (provider('format = "{secret}{secret}"'), "providers[1].format", "exactly one {secret}"),
        (provider('format = "{secret}\\r\\nX: y"'), "providers[1].format", "visible ASCII"),
        (provider('format = " {secret}"'), "providers[1].format", "visible ASCII"),
        (provider(file=""), "providers[1]", "has no secret"),
        (provider("sealed = true"), "providers[1].sealed", "needs secrets.key_file"),
        (upstream("http://compute.example") + provider(), "providers[1].allow_plaintext", "upstream.url has no TLS"),
        (upstream("https://compute.example", "http://10.0.0.1") + provider(), "providers[1].allow_plaintext",
         "upstream.test_url has no TLS"),
        # signals that suspend
        ('[anomalies]\nsuspend = ["burst"]\n', "anomalies.suspend", "'burst' must also be in anomalies.watch"),
        ('[anomalies]\nwatch = ["probing"]\nsuspend = ["probing"]\n', "anomalies.suspend", "must not suspend"),
        ('[anomalies]\nwatch = ["failures"]\nsuspend = ["failures"]\n', "anomalies.suspend", "must not suspend"),
        # bodies
        ("[mcp]\nbody_bytes_max = 1073741824\n" + SEARCH + MCP_ROUTE, "mcp.body_bytes_max", "tokens.body_memory_max"),
        ("[mcp]\nbody_bytes_max = 1073741824\n" + tool('approval = "human"') + route('tool = "search"'),
         "mcp.body_bytes_max", "tokens.body_memory_max"),
    ],
)  # fmt: skip
def test_contradiction_is_refused_with_its_key_and_reason(tmp_path: Path, text: str, key: str, reason: str) -> None:
    found = [one for one in problems(tmp_path, text) if one.startswith(f"{key}: ")]
    assert any(reason in one for one in found), problems(tmp_path, text)


@pytest.mark.parametrize(
    "header",
    [
        "Connection", "Keep-Alive", "Proxy-Authorization", "TE", "Trailer", "Upgrade",  # hop-by-hop
        "Content-Length", "Transfer-Encoding", "Content-Type", "Content-Encoding", "Expect",  # framing and type
        "Host", "X-Keyproxy-User", "x-keyproxy-anything", "X_Keyproxy_Tool",  # identity
        "X-Request-Id", "Forwarded", "X-Forwarded-For", "X-Real-Ip", "X-HTTP-Method-Override",
        "X_Api_Key", "Content_Length", "", "a b", "a:b", "Caf\u00e9",
    ],
)  # fmt: skip
def test_provider_header_with_another_meaning_is_refused(tmp_path: Path, header: str) -> None:
    found = problems(tmp_path, provider(f'header = "{header}"'))
    assert found == [f"providers[1].header: {header!r} is not a header that can hold a credential"]


@pytest.mark.parametrize(
    "header", ["Authorization", "x-api-key", "api-key", "X-Goog-Api-Key", "Ocp-Apim-Subscription-Key"]
)
def test_provider_header_of_a_credential_is_accepted(tmp_path: Path, header: str) -> None:
    assert load(tmp_path, provider(f'header = "{header}"', 'format = "{secret}"')).providers[0].header == header


@pytest.mark.parametrize(
    ("url", "is_open"),
    [
        ("http://127.0.0.1:9000", False), ("http://127.8.8.8", False), ("http://[::1]:9000", False),
        ("http://localhost:9000", False), ("https://compute.example", False), ("unix:/run/compute.sock", False),
        ("http://10.0.0.1", True), ("http://compute.example", True), ("http://localhost.example", True),
        ("http://[2001:db8::1]", True), ("http://0.0.0.0", True),
    ],
)  # fmt: skip
def test_upstream_without_tls_on_another_machine_is_plaintext(url: str, is_open: bool) -> None:
    assert is_plaintext(url) is is_open


@pytest.mark.parametrize(
    "text",
    [
        tool('credentials = ["oauth", "agent"]'),
        tool('mcp = "x"', name="y") + tool('mcp = "y"', name="x"),
        CA + tool("client_certificate = true"),
        upstream("http://compute.example") + provider("allow_plaintext = true"),
        upstream("https://compute.example") + provider(),
        provider(file='test_secret_file = "/run/secrets/t"\n'),
        '[secrets]\nkey_file = "k"\n' + provider("sealed = true", file=""),
        '[anomalies]\nwatch = ["burst", "probing"]\nsuspend = ["burst"]\n',
        "[mcp]\nbody_bytes_max = 1073741824\n" + tool('approval = "human"'),
    ],
)
def test_settings_without_contradiction_are_accepted(tmp_path: Path, text: str) -> None:
    load(tmp_path, text)


@pytest.mark.parametrize(
    ("stated", "demands", "is_required"),
    [("", False, True), ("", True, False), ("required", True, True), ("optional", False, False)],
)
def test_every_client_needs_a_certificate_unless_tools_demand_it_themselves(
    tmp_path: Path, stated: str, demands: bool, is_required: bool
) -> None:
    text = CA + f'tls_client_certificate = "{stated}"\n' + tool(f"client_certificate = {str(demands).lower()}")
    settings = load(tmp_path, text)
    assert settings.requires_client_certificates is is_required
    assert bool(certificate_warnings(settings)) is (not stated and demands)


def test_mcp_route_has_the_error_shape_of_mcp_by_default(tmp_path: Path) -> None:
    settings = load(tmp_path, SEARCH + MCP_ROUTE + route(match="POST /other"))
    assert [one.error_shape for _, one in settings.route_table().rows] == ["mcp", "problem"]


def test_routes_that_call_tools_have_rules_and_others_have_none(tmp_path: Path) -> None:
    text = "[mcp]\nbody_bytes_max = 2048\n" + tool('mcp = "find"') + MCP_ROUTE
    settings = load(tmp_path, text + route('tool = "search"') + route(match="POST /other"))
    routes = settings.route_table()
    rules = tool_rules(settings, routes)
    assert [rules.get(one) is not None for _, one in routes.rows] == [True, True, False]
    by_mcp, plain = (rules[one] for _, one in routes.rows[:2])
    assert by_mcp.mcp is not None
    assert by_mcp.mcp.body_bytes_max == plain.body_bytes_max == 2048
    assert by_mcp.table.by_mcp["find"] is plain.tool


def test_config_check_exits_2_with_every_reason(tmp_path: Path) -> None:
    path = tmp_path / "keyproxy.toml"
    path.write_text(MCP_ROUTE + 'tool = "search"\n', encoding="utf-8")
    command = [sys.executable, "-m", "keyproxy", "config", "check", "--offline", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "routes[1].tool: there is no tool 'search'" in done.stderr
    assert "routes[1].tool: must not be set with protocol = 'mcp'" in done.stderr
    assert "routes[1].protocol: 'mcp' needs [[tools]]" in done.stderr
