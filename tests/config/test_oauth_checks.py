"""OAuth: what the settings contradict is refused, with the key and the reason; without a resource nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from keyproxy.cli.commands.config import config_group
from keyproxy.config import loader
from keyproxy.config.loader import ConfigError
from keyproxy.config.oauth import oauth_checks
from keyproxy.config.oauth.client_rules import client_policy, known_clients
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.config.schema import Listen, Settings
from keyproxy.oauth import redirect_uris

ISSUER = "https://mcp.example.com"
RESOURCE = "https://mcp.example.com/mcp"


def config(*lines: str, tables: str = "", issuer: str = ISSUER, resource: str = RESOURCE) -> str:
    """A configuration with `[oauth]`, these further lines of it, and these tables."""
    first = f'[oauth]\nissuer = {json.dumps(issuer)}\nresource = {json.dumps(resource)}\nscopes = ["jobs:write"]\n'
    return first + "".join(f"{line}\n" for line in lines) + tables


def login(*lines: str) -> str:
    return "[oauth.login]\n" + "".join(f"{line}\n" for line in lines)


OIDC = ('kind = "oidc"', 'client_id = "keyproxy"')
KNOWN = '[[oauth.known_clients]]\nname = "Acme"\n'


def load(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "keyproxy.toml"
    path.write_text(text, encoding="utf-8")
    return loader.load(path, {}).settings


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        (config(tables="[errors]\ninvalid_key_status = 403\n"), "errors.invalid_key_status", "must be 401"),
        (config(issuer=""), "oauth.issuer", "required"),
        *(
            (text, key, reason)
            for url, reason in (
                ("http://mcp.example.com", "must be https"),
                ("http://10.0.0.1", "must be https"),
                ("ftp://mcp.example.com", "must be 'https://"),
                ("mcp.example.com", "must be 'https://"),
                ("https://", "must be 'https://"),
                ("https://mcp.example.com:0", "must be 'https://"),
                ("https://mcp.example.com:x", "not a URL"),
                ("https://mcp.example.com/", "must not end with '/'"),
                ("https://mcp.example.com/a/", "must not end with '/'"),
                ("https://mcp.example.com?a", "no query"),
                ("https://mcp.example.com/a?", "no query"),
                ("https://mcp.example.com/a#b", "no fragment"),
                ("https://u@mcp.example.com", "no user"),
                ("https://u:p@mcp.example.com/a", "no user"),
                ("https://MCP.example.com", "lower case"),
                ("HTTPS://mcp.example.com", "lower case"),
                ("https://mcp.example.com/a/../b", "dot segments"),
                ("https://mcp.example.com//a", "empty or dot"),
                ("https://mcp.example.com/a b", "invalid in a URL"),
            )
            for text, key in (
                (config(issuer=url), "oauth.issuer"),
                (config(resource=url), "oauth.resource"),
                (config(f"test_resource = {json.dumps(url)}"), "oauth.test_resource"),
            )
        ),
        (config(f'test_resource = "{RESOURCE}"'), "oauth.test_resource", "must not be oauth.resource"),
        (config('tls_key_file = "k.pem"'), "oauth.tls_key_file", "without oauth.tls_certificate_file"),
        (
            config('mtls_address = "127.0.0.1:8444"', 'tls_certificate_file = "c.pem"'),
            "oauth.mtls_address",
            "without oauth.mtls_client_ca_file",
        ),
        (
            config('mtls_address = "127.0.0.1:8444"', 'mtls_client_ca_file = "ca.pem"'),
            "oauth.mtls_address",
            "without oauth.tls_certificate_file",
        ),
        (config('address = "127.0.0.1:8080"'), "oauth.address", "overlaps listen.address"),
        (config('ops_address = "127.0.0.1:8082"'), "oauth.ops_address", "overlaps oauth.address"),
        (config('redirect_hosts = ["https://acme.example"]'), "oauth.redirect_hosts", "not a host name"),
        (config('document_hosts = ["acme.example:443"]'), "oauth.document_hosts", "not a host name"),
        (config('document_networks = ["10.0.0.1/8"]'), "oauth.document_networks", "host bits set"),
        (config('document_networks = ["intranet"]'), "oauth.document_networks", "intranet"),
        (
            f"[oauth]\nscopes = {json.dumps([f'a:{number}' for number in range(129)])}\n",
            "oauth.scopes",
            "at most 128 scopes",
        ),
        (config("access_token_seconds = 59"), "oauth.access_token_seconds", "at least 60"),
        (config("access_token_seconds = 86401"), "oauth.access_token_seconds", "at most 86400"),
        (config("refresh_grace_seconds = 601"), "oauth.refresh_grace_seconds", "at most 600"),
        (config("refresh_grace_seconds = -1"), "oauth.refresh_grace_seconds", "at least 0"),
        (config('registration = "closed"'), "oauth.registration", "must be 'open' or 'listed' or 'off'"),
        (config('documents = "listed"'), "oauth.documents", "must be 'open' or 'off'"),
        (config('language = "fr"'), "oauth.language", "'en' or 'ko' or 'ja'"),
        (config(tables=login('kind = "saml"')), "oauth.login.kind", "must be 'key' or 'oidc'"),
        (config(tables=login('kind = "oidc"', 'client_id = "k"')), "oauth.login.issuer", "required"),
        (config(tables=login('kind = "oidc"', f'issuer = "{ISSUER}"')), "oauth.login.client_id", "required"),
        (config(tables=login(*OIDC, 'issuer = "http://idp.example"')), "oauth.login.issuer", "must be https"),
        *(
            (
                config(tables=login(*OIDC, f'issuer = "https://login.microsoftonline.com/{tenant}/v2.0"')),
                "oauth.login.issuer",
                "must name your tenant",
            )
            for tenant in ("common", "organizations", "consumers", "Common")
        ),
        (config(tables=login(*OIDC, f'issuer = "{ISSUER}"', 'scopes = ["email"]')), "oauth.login.scopes", "'openid'"),
        (
            config(tables=login(*OIDC, f'issuer = "{ISSUER}"', "subject_claims = []")),
            "oauth.login.subject_claims",
            "claim",
        ),
        (config(tables=login('provision = "create"')), "oauth.login.tenants", "required with provision = 'create'"),
        (config(tables=login('tenants = { "a" = "acme" }')), "oauth.login.tenant_claim", "required"),
        (
            config(tables=login('tenant_claim = "tid"', 'tenants = { "a" = "no tenant" }')),
            "oauth.login.tenants",
            "not a valid tenant id",
        ),
        (config(tables=KNOWN), "oauth.known_clients[1].redirect_uris", "must have an entry"),
        (config(tables="[[oauth.known_clients]]\n"), "oauth.known_clients[1]", "has no name"),
        (config(tables=KNOWN.replace("Acme", "")), "oauth.known_clients[1].name", "1 to 200 characters"),
        (config(tables=KNOWN.replace("Acme", " Acme")), "oauth.known_clients[1].name", "1 to 200 characters"),
        *(
            (config(tables=f'{KNOWN}redirect_uris = ["{uri}"]\n'), "oauth.known_clients[1].redirect_uris", "'")
            for uri in (
                "http://acme.example/cb",
                "javascript:alert(1)",
                "https://acme.example/cb#x",
                "https://{}/cb",
                "https://{}.example/cb",
                "https://acme.example/x{}",
                "https://acme.example/{}x",
                "https://acme.example/cb?a={}",
                "{}://x",
            )
        ),
        (
            config(tables=f'{KNOWN}redirect_uris = ["https://a.example/"]\nclient_ids = ["\u00e9"]\n'),
            "oauth.known_clients[1].client_ids",
            "not a valid client id",
        ),
        (
            config(tables=f'{KNOWN}redirect_uris = ["https://a.example/"]\n' * 2),
            "oauth.known_clients",
            "'Acme' is configured twice",
        ),
    ],
)
def test_contradiction_is_refused_with_its_key(tmp_path: Path, text: str, key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert [problem for problem in error.value.problems if problem.startswith(f"{key}: ")], error.value.problems
    assert any(reason in problem for problem in error.value.problems), error.value.problems


@pytest.mark.parametrize(
    "text",
    [
        config(),
        config(issuer="http://127.0.0.1:8082", resource="http://localhost:8080/mcp"),
        config(issuer="http://[::1]:8082/auth"),
        config('test_resource = "https://mcp.example.com/test"', 'document_networks = ["10.0.0.0/8", "fd00::/8"]'),
        config('mtls_address = "127.0.0.1:8444"', 'mtls_client_ca_file = "ca.pem"', 'tls_certificate_file = "c.pem"'),
        config(tables=login(*OIDC, 'issuer = "https://tenant.auth0.example/"')),
        config(tables=login(*OIDC, 'issuer = "https://login.microsoftonline.com/9f4c/v2.0"')),
        config(tables=login('provision = "create"', 'tenant_claim = "tid"', 'tenants = { "9f4c" = "acme" }')),
        config(
            tables=f'{KNOWN}redirect_uris = ["https://acme.example/{{}}", "acme://cb", "https://a.example/{{}}/cb"]\n'
        ),
        # without a resource there is no authorization server
        '[oauth]\nissuer = "x"\n[errors]\ninvalid_key_status = 403\n',
        '[oauth]\ntest_resource = "x"\n[oauth.login]\nkind = "oidc"\nprovision = "create"\n',
        "[errors]\ninvalid_key_status = 403\n",
    ],
)
def test_configuration_without_a_contradiction_is_accepted(tmp_path: Path, text: str) -> None:
    load(tmp_path, text)


def check(tmp_path: Path, text: str) -> tuple[int, str]:
    path = tmp_path / "keyproxy.toml"
    path.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(config_group, ["check", "--offline", "--config", str(path)], standalone_mode=False)
    problems = result.exception.problems if isinstance(result.exception, ConfigError) else []
    return len(problems), "\n".join([*problems, result.output])


@pytest.mark.parametrize(("length", "is_accepted"), [(0, False), (31, False), (32, True)])
def test_check_refuses_a_short_secret(tmp_path: Path, length: int, *, is_accepted: bool) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * length)
    for key in ("secret_file", "secret_previous_file"):
        other = "" if key == "secret_file" else f'secret_file = "{secret}"'
        problems, output = check(tmp_path, config(f'{key} = "{secret}"', other))
        assert ("32 bytes" in output) is not is_accepted
        assert (problems == 0) is is_accepted, output


@pytest.mark.parametrize(
    ("lines", "tables", "problem"),
    [
        ((), "", "oauth.secret_file: is required"),
        (('secret_file = "/nonexistent"',), "", "oauth.secret_file: cannot be read"),
        (
            ('secret_file = "/nonexistent"',),
            login(*OIDC, f'issuer = "{ISSUER}"', 'client_secret_file = "/nonexistent"'),
            "oauth.login.client_secret_file: cannot be read",
        ),
        (('document_ca_file = "/nonexistent"',), "", "oauth.document_ca_file: /nonexistent"),
        (('tls_certificate_file = "/nonexistent"',), "", "oauth.tls_certificate_file: "),
    ],
)
def test_check_refuses_files_that_cannot_be_used(
    tmp_path: Path, lines: tuple[str, ...], tables: str, problem: str
) -> None:
    assert problem in check(tmp_path, config(*lines, tables=tables))[1]


def test_proxy_needs_no_file_of_the_authorization_server(tmp_path: Path) -> None:
    load(tmp_path, config('secret_file = "/nonexistent"', 'document_ca_file = "/nonexistent"'))


def test_check_warns_of_route_scopes_that_no_token_can_have(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 32)
    routes = "".join(
        f'[[routes]]\nmatch = "{match}"\nscopes = {json.dumps(scopes)}\n'
        for match, scopes in (
            ("GET /a", ["jobs:write"]),
            ("GET /b", ["jobs:read", "jobs:write"]),
            ("GET /c", ["jobs:read"]),
        )
    )
    problems, output = check(tmp_path, config(f'secret_file = "{secret}"', tables=routes))
    assert problems == 0
    assert output.count("warning: oauth.scopes: has no jobs:read, which the route 'GET /b' requires") == 1
    assert output.count("oauth.scopes") == 1
    assert check(tmp_path, routes)[1].count("oauth") == 0


def test_check_warns_of_keys_without_effect(tmp_path: Path) -> None:
    settings = load(tmp_path, '[oauth]\nissuer = "https://mcp.example.com"\n')
    assert ["oauth.resource: is not set" in one for one in oauth_checks.warnings(settings)] == [True]
    assert oauth_checks.warnings(load(tmp_path, "")) == []


def test_known_clients_of_the_package_are_valid_and_configured_ones_replace_them(tmp_path: Path) -> None:
    packaged = known_clients(())
    assert [client.name for client in packaged.clients] == ["Claude", "Claude Code", "ChatGPT", "VS Code", "Cursor"]
    assert packaged.schemes == {"cursor"}
    for uri, name in (
        ("https://claude.ai/api/mcp/auth_callback", "Claude"),
        ("https://claude.com/api/mcp/auth_callback", "Claude"),
        ("https://chatgpt.com/connector/oauth/aB3", "ChatGPT"),
        ("https://chatgpt.com/connector_platform_oauth_redirect", "ChatGPT"),
        ("https://vscode.dev/redirect", "VS Code"),
        ("https://www.cursor.com/agents/mcp/oauth/callback", "Cursor"),
    ):
        found = packaged.by_redirect_uri(uri)
        assert found is not None
        assert found.name == name
    rows = [(client.name, uri) for client in packaged.clients for uri in client.redirect_uris]
    assert [uri for _, uri in rows if redirect_uris.fault(uri.replace("{}", "a"), packaged.schemes)] == []
    settings = load(tmp_path, config(tables=f'{KNOWN}redirect_uris = ["https://acme.example/cb"]\n'))
    assert [client.name for client in client_policy(settings).known.clients] == ["Acme"]


def test_example_shows_the_known_clients_of_the_package(tmp_path: Path) -> None:
    example = Path(__file__).parents[2].joinpath("config.example.toml").read_text(encoding="utf-8")
    rows = example[example.index("# [[oauth.known_clients]]") :].partition("\n\n")[0]
    shown = load(tmp_path, "\n".join(line.removeprefix("#").strip() for line in rows.splitlines()))
    assert known_clients(shown.oauth_known_clients).clients == known_clients(()).clients


@pytest.mark.parametrize("ca_file", ["", "ca.pem"])
def test_tokens_bound_to_certificates_that_proxies_do_not_ask_for_cause_a_warning(ca_file: str) -> None:
    settings = Settings(
        listen=Listen(tls_client_ca_file=ca_file),
        oauth=OAuthSettings(resource="https://a.example/mcp", mtls_address="127.0.0.1:8443"),
    )
    assert any("they refuse these tokens" in one for one in oauth_checks.warnings(settings)) is not bool(ca_file)
