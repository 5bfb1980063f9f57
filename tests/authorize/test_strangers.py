"""Whatever strangers send, the authorization server responds with an error of theirs, not with one of its own."""

from __future__ import annotations

from urllib.parse import quote_from_bytes

import pytest

from tests.authorize.authority import Authority, pkce

JWT_BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

#: Values that parsers of URLs, ids, tickets, assertions and text stumble over.
VALUES = [
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", "\u202e\U0001f600".encode(), b" ", b"\r\nX-Injected: 1", b"x" * 5_000,
    b"https://[::1", b"https://", b"http://127.0.0.1:99999/", b"http://localhost:x/", b"javascript:alert(1)",
    b"//a.example", b"kpc1_", b"kpc1_e30", b"kpc1_" + b"A" * 1_990, b"listed:Claude", b"a.b", b"eyJhbGciOiJub25lIn0.e30.",
    b"eyJhbGciOlsxXX0.e30.AA", b"kp_refresh_" + b"a" * 49, b"\"'><script>alert(1)</script>",
]  # fmt: skip

HEADERS = [
    {"Authorization": "Basic \u00ff"}, {"Authorization": "Basic YQ=="}, {"Authorization": "Bearer a b"},
    {"Cookie": "keyproxy-login=\u00ff; keyproxy-user=a.b; =;;"}, {"Accept-Language": "ko;q=nan, *;q=x"},
    {"X-Forwarded-For": "::ffff:1.2.3.4%x, ,"}, {"Content-Type": 'text/plain; charset="'}, {"Sec-Fetch-Site": "\u00ff"},
]  # fmt: skip

#: The method and good parameters of each endpoint.
REQUESTS: dict[str, tuple[str, dict[str, str]]] = {
    "/oauth/authorize": (
        "GET",
        {
            "client_id": "kpc1_x", "redirect_uri": "https://acme.example/cb", "response_type": "code",
            "scope": "jobs:write", "state": "s", "resource": "https://a.example",
            "code_challenge": pkce()[1], "code_challenge_method": "S256",
        },
    ),
    "/oauth/login": ("POST", {"ticket": "a.b", "key": "k"}),
    "/oauth/consent": ("POST", {"ticket": "a.b", "decision": "allow"}),
    "/oauth/token": (
        "POST",
        {
            "client_id": "kpc1_x", "grant_type": "authorization_code", "code": "c" * 43, "code_verifier": "v" * 43,
            "redirect_uri": "https://acme.example/cb",
        },
    ),
    "/oauth/revoke": ("POST", {"client_id": "kpc1_x", "token": "kp_access_" + "a" * 49}),
    "/oauth/introspect": (
        "POST",
        {"token": "kp_access_" + "a" * 49, "client_assertion": "a.b.c", "client_assertion_type": JWT_BEARER},
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", REQUESTS)
async def test_no_parameter_and_no_header_of_a_stranger_causes_an_internal_error(
    authority: Authority, path: str
) -> None:
    program = {"client_name": "Acme", "redirect_uris": ["https://acme.example/cb"]}
    client_id = (await authority.call("POST", "/oauth/register", content=program)).json["client_id"]
    method, usual = REQUESTS[path]
    good = {name: (client_id if name == "client_id" else value).encode() for name, value in usual.items()}
    tried = [{**good, name: value} for name in good for value in VALUES]
    for parameters, headers in [*((one, {}) for one in tried), *((good, one) for one in HEADERS)]:
        encoded = "&".join(f"{name}={quote_from_bytes(value)}" for name, value in parameters.items())
        authority.clock.advance(60)  # past every rate limit
        if method == "GET":
            reply = await authority.call("GET", f"{path}?{encoded}", headers=headers)
        else:
            form = {"Content-Type": "application/x-www-form-urlencoded"} | headers
            reply = await authority.call("POST", path, data=encoded.encode(), headers=form)
        assert reply.status < 500, (parameters, headers, reply.text)
        assert "X-Injected" not in reply.headers
        assert b"<script>" not in reply.body
