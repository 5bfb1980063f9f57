"""Redirect URIs: which are accepted, and that comparison forgives the port of loopback and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.oauth import redirect_uris
from keyproxy.oauth.redirect_uris import BYTES_MAX, fault, matches

LONGEST = "https://acme.example/" + "a" * (BYTES_MAX - len("https://acme.example/"))


@pytest.mark.parametrize(
    "uri",
    [
        "https://acme.example/cb",
        "https://acme.example",
        "https://acme.example:8443/cb?a=1&b=%20",
        "https://192.0.2.1/cb",
        "https://[2001:db8::1]:8443/cb",
        "https://[2001:DB8::1]/cb",
        "https://1.0x.example/cb",
        "https://a_b.acme.example./cb@here",
        "http://127.0.0.1/cb",
        "http://127.0.0.1:49152/cb",
        "http://[::1]:49152/cb",
        "http://localhost:49152",
        "http://localhost?x=1",
        "com.example.app:/cb",
        "com.example.app://cb",
        "cursor://anysphere.cursor-mcp/oauth/callback",
        LONGEST,
    ],
)
def test_redirect_uri_is_accepted(uri: str) -> None:
    assert fault(uri, {"cursor"}) is None


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("", "empty"),
        (LONGEST + "a", "bytes"),
        *((f"{scheme}:x", "not allowed") for scheme in (
            "javascript", "data", "vbscript", "file", "blob", "about", "intent", "filesystem", "ms-settings", "ms-x.y",
            "JavaScript", "DATA", "Ms-Word",
        )),
        ("https://acme.example/cb#", "fragment"),
        ("https://acme.example/cb#x", "fragment"),
        ("com.example.app:/cb#x", "fragment"),
        ("https://user@acme.example/cb", "userinfo"),
        ("https://acme.example@evil.example/cb", "userinfo"),
        ("https://@acme.example/cb", "userinfo"),
        ("com.example.app://user@host/cb", "userinfo"),
        ("http://acme.example/cb", "another host"),
        ("http://127.0.0.2/cb", "another host"),
        ("http://127.0.0.1.evil.example/cb", "another host"),
        ("http://localhost.evil.example/cb", "another host"),
        ("http://127.1/cb", "another host"),
        ("http://0.0.0.0/cb", "another host"),
        ("http://LOCALHOST/cb", "another host"),
        ("http:127.0.0.1/cb", "another host"),
        ("http://localhost:/cb", "another host"),
        ("http://localhost:0/cb", "port"),
        ("http://localhost:65536/cb", "port"),
        ("https://acme.example:0/", "port"),
        ("https://acme.example:99999/", "port"),
        ("https://acme.example:/", "host"),
        ("https:///cb", "host"),
        ("https:acme.example", "host"),
        ("https://", "host"),
        ("https://-acme.example/", "host"),
        ("https://acme..example/", "host"),
        ("https://acme%2eexample/", "host"),
        *((f"https://{host}/cb", "IP address") for host in (
            "0x7f.1", "0x7F000001", "2130706433", "0177.0.0.1", "127.1", "127.0.0.1.", "0", "1.0x", "evil.1", "1.2.3.4.5",
            "256.1.1.1", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[:]", "[1.2.3.4]",
            "[2001:db8:0::1]",
        )),
        ("HTTPS://acme.example/cb", "upper case"),
        ("app:/cb", "private-use"),
        ("mailto:a", "private-use"),
        ("/cb", "no scheme"),
        ("//acme.example/cb", "no scheme"),
        ("acme", "no scheme"),
        *((f"https://acme.example/{character}", "character") for character in (
            " ", "\t", "\n", "\r", "\0", "\\", '"', "<", ">", "{}", "|", "^", "`", "é", "\u202e", "%zz", "%", "\ud800",
        )),
        ("https://acme.example\\@evil.example/", "character"),
        (" https://acme.example/cb", "character"),
        ("java\tscript:alert(1)", "character"),
    ],
)  # fmt: skip
def test_redirect_uri_is_refused_with_the_reason(uri: str, why: str) -> None:
    assert why in (fault(uri, {"cursor"}) or "accepted")


def test_private_scheme_without_a_dot_is_accepted_for_known_clients_only() -> None:
    uri = "cursor://anysphere.cursor-mcp/oauth/callback"
    assert fault(uri, {"cursor"}) is None
    assert fault(uri) is not None
    assert fault("javascript:x", {"javascript"}) is not None


@pytest.mark.parametrize(
    ("registered", "presented"),
    [
        ("https://acme.example/cb", "https://acme.example/cb"),
        ("http://127.0.0.1/cb", "http://127.0.0.1:49152/cb"),
        ("http://127.0.0.1:33418/cb", "http://127.0.0.1:49152/cb"),
        ("http://127.0.0.1:33418/cb", "http://127.0.0.1/cb"),
        ("http://localhost/cb?a=1", "http://localhost:1/cb?a=1"),
        ("http://[::1]/", "http://[::1]:65535/"),
        ("https://chatgpt.com/connector/oauth/{}", "https://chatgpt.com/connector/oauth/aB3_-~x"),
    ],
)
def test_presented_redirect_uri_matches(registered: str, presented: str) -> None:
    assert matches(registered, presented)


@pytest.mark.parametrize(
    ("registered", "presented"),
    [
        ("https://acme.example/cb", "https://acme.example/cb/"),
        ("https://acme.example/cb", "https://acme.example/CB"),
        ("https://acme.example/cb", "https://ACME.example/cb"),
        ("https://acme.example/cb", "https://acme.example:443/cb"),
        ("https://acme.example/cb", "https://acme.example/cb?x=1"),
        ("https://acme.example/cb", "https://acme.example/c%62"),
        ("https://acme.example/cb", "https://acme.example/x/../cb"),
        ("https://acme.example/cb", "http://acme.example/cb"),
        ("https://localhost:1/cb", "https://localhost:2/cb"),
        ("com.example.app://h:1/cb", "com.example.app://h:2/cb"),
        ("http://127.0.0.1/cb", "http://localhost/cb"),
        ("http://127.0.0.1/cb", "http://[::1]/cb"),
        ("http://127.0.0.1/cb", "http://127.0.0.1:1/other"),
        ("http://127.0.0.1/", "http://127.0.0.1"),
        ("http://127.0.0.1/cb", "http://127.0.0.1:1@evil.example/cb"),
        ("http://127.0.0.1", "http://127.0.0.1.evil.example"),
        ("http://127.0.0.1", "http://127.0.0.1:80.evil.example"),
        *(("https://chatgpt.com/connector/oauth/{}", f"https://chatgpt.com/connector/oauth/{segment}") for segment in (
            "", ".", "..", "a/b", "a?b", "a#b", "%2e%2e", "a%2Fb", "a\n", "{}/x", "@evil",
        )),
        ("https://chatgpt.com/connector/oauth/{}", "https://chatgptXcom/connector/oauth/a"),
        ("https://chatgpt.com/{}/x", "https://chatgpt.com/../x"),
    ],
)  # fmt: skip
def test_presented_redirect_uri_does_not_match(registered: str, presented: str) -> None:
    assert not matches(registered, presented)


HOSTS = st.sampled_from(["127.0.0.1", "[::1]", "localhost"])
PATHS = st.sampled_from(["", "/", "/cb", "/a/cb", "?x=1", "/cb?x=1&y"])


@given(host=HOSTS, path=PATHS, ports=st.tuples(st.integers(1, 65_535), st.integers(1, 65_535)))
def test_any_two_ports_of_one_loopback_uri_match(host: str, path: str, ports: tuple[int, int]) -> None:
    one, other = (f"http://{host}:{port}{path}" for port in ports)
    assert fault(one) is None
    assert matches(one, other)
    assert matches(redirect_uris.without_loopback_port(one), other)


@given(
    st.text(alphabet="htps:/.@#?\\%{}[]12locaue-", max_size=30), st.text(alphabet="htps:/.@#?\\[]12loca", max_size=30)
)
def test_uris_that_match_differ_in_the_port_of_loopback_only(one: str, other: str) -> None:
    if redirect_uris.SEGMENT not in one and matches(one, other):
        assert one == other or redirect_uris.without_loopback_port(one) == redirect_uris.without_loopback_port(other)
        assert redirect_uris.host(one) == redirect_uris.host(other)


def test_users_are_shown_the_host_or_the_scheme() -> None:
    shown = redirect_uris.shown_target
    assert shown("https://Acme.example:8443/cb?https://claude.ai") == "acme.example"
    assert shown("http://[::1]:1/cb") == "[::1]"
    assert shown("com.example.app://claude.ai/cb") == "com.example.app:"
