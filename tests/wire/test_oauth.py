"""OAuth access tokens over sockets: challenges, the metadata of the resource, and which tokens are accepted where."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import ssl
from typing import Final

import pytest
import trustme

from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.config.schema import RouteRow, Settings
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.model import Ending, Identity, OAuthSession
from keyproxy.reasons import Reason
from tests import fakes
from tests.rawhttp import Message, Upstream, connect
from tests.wire.conftest import KEY, Start, Wire, request
from tests.wire.test_long import REVOKED_SECONDS, stream

ORIGIN: Final = "https://mcp.example.com"
BARE: Final = "/.well-known/oauth-protected-resource"
OAUTH: Final = OAuthSettings(
    issuer=ORIGIN,
    resource=f"{ORIGIN}/mcp",
    test_resource=f"{ORIGIN}/test",
    scopes=["jobs:write", "offline_access", "jobs:read"],
)
METADATA: Final = f'resource_metadata="{ORIGIN}{BARE}/mcp"'
API_KEY: Final = 'Api-Key realm="keyproxy"'
ACCESS: Final = fakes.FORMAT.make_access_token(bytes(32)).reveal()
REFRESH: Final = fakes.FORMAT.make_refresh_token(bytes(32)).reveal()
SECRET: Final = fakes.FORMAT.make_client_secret(bytes(32)).reveal()


def session(identity: Identity, *, bound_to: bytes | None = None) -> Identity:
    """The identity of a session of this user."""
    return dataclasses.replace(identity, key_id="ses_1", oauth=OAuthSession("gra_1", "cli_1", bound_to))


def bearing(credential: bytes, *lines: str, target: str = "/v1/ai/jobs", scheme: str = "Bearer") -> bytes:
    return request("GET", target, f"Authorization: {scheme} {credential.decode()}", *lines, key=None)


async def answer_to(wire: Wire, raw: bytes) -> Message:
    """The response, on a connection of its own."""
    async with wire.client() as client:
        await client.send(raw)
        return await client.answer(method=raw.partition(b" ")[0].decode())


def accept(wire: Wire, identity: Identity | None = None, *, bound_to: bytes | None = None) -> None:
    """Resolve ACCESS to a session of this user."""
    wire.identities.table[fakes.FORMAT.make_access_token(bytes(32)).digest()] = session(
        identity or fakes.identity(), bound_to=bound_to
    )


# -- challenges


@pytest.mark.parametrize(
    ("raw", "code", "error"),
    [
        (request("GET", "/", key=None), "api_key_missing", ""),
        (request("GET", "/", "Authorization: Basic eDp5", key=None), "api_key_missing", ""),
        (request("GET", "/", key=fakes.key(99).reveal()), "api_key_invalid", 'error="invalid_token", '),
        (bearing(ACCESS), "api_key_invalid", 'error="invalid_token", '),
        (bearing(b"x"), "api_key_invalid", 'error="invalid_token", '),
    ],
)
async def test_every_401_leads_to_the_metadata_before_the_challenge_for_keys(
    start: Start, raw: bytes, code: str, error: str
) -> None:
    wire = await start(oauth=OAUTH)
    answer = await answer_to(wire, raw)
    assert (answer.status, json.loads(answer.body)["code"]) == (401, code)
    assert answer.all("WWW-Authenticate") == [f'Bearer {error}{METADATA}, scope="jobs:write jobs:read"', API_KEY]


async def test_a_challenge_without_offered_scopes_names_none(start: Start) -> None:
    wire = await start(oauth=OAuthSettings(issuer=ORIGIN, resource=ORIGIN))
    answer = await answer_to(wire, request("GET", "/", key=None))
    assert answer.all("WWW-Authenticate") == [f'Bearer resource_metadata="{ORIGIN}{BARE}"', API_KEY]


ROWS: Final = [
    RouteRow("POST /mcp", scopes=["mcp:use"], protocol="mcp"),
    RouteRow("GET /tool", scopes=["mcp:use"], tool="search"),
    RouteRow("GET /a", scopes=["a:read", "jobs:write"]),
]
TOOLS: Final = [ToolRow("search", scopes=["search:run"])]


@pytest.mark.parametrize(
    ("target", "missing", "needed"),
    [("/a", "a:read", "a:read jobs:write"), ("/tool", "mcp:use search:run", "mcp:use search:run")],
)
async def test_a_403_names_all_that_the_route_needs_to_oauth_clients_and_what_is_missing_to_keys(
    start: Start, target: str, missing: str, needed: str
) -> None:
    wire = await start(oauth=OAUTH, rows=ROWS, tools=TOOLS)
    accept(wire)
    for raw in (bearing(ACCESS, target=target), request("GET", target)):
        answer = await answer_to(wire, raw)
        assert answer.status == 403
        assert answer.all("WWW-Authenticate") == [
            f'Bearer error="insufficient_scope", scope="{needed}", {METADATA}',
            f'{API_KEY}, error="insufficient_scope", scope="{missing}"',
        ]


async def test_a_json_rpc_refusal_has_the_challenges_too(start: Start) -> None:
    wire = await start(oauth=OAUTH, rows=ROWS, tools=TOOLS)
    accept(wire, fakes.identity(scopes=frozenset({"mcp:use"})))
    call = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","arguments":{}}}'
    lines = ["Content-Type: application/json", "Accept: application/json, text/event-stream"]
    refused = await answer_to(wire, request("POST", "/mcp", *lines, body=call, key=None))
    assert (refused.status, json.loads(refused.body)["error"]["data"]["code"]) == (401, "api_key_missing")
    assert refused.all("WWW-Authenticate") == [f'Bearer {METADATA}, scope="jobs:write jobs:read"', API_KEY]
    lines.append(f"Authorization: Bearer {ACCESS.decode()}")
    refused = await answer_to(wire, request("POST", "/mcp", *lines, body=call, key=None))
    assert json.loads(refused.body)["error"]["data"]["code"] == "tool_not_allowed"
    assert refused.all("WWW-Authenticate")[0] == (
        f'Bearer error="insufficient_scope", scope="mcp:use search:run", {METADATA}'
    )


async def test_a_403_that_no_scope_would_change_has_no_challenge(start: Start) -> None:
    wire = await start(oauth=OAUTH, rows=ROWS, tools=TOOLS)
    accept(wire)
    answer = await answer_to(wire, bearing(ACCESS, target="/elsewhere"))
    assert (answer.status, answer.all("WWW-Authenticate")) == (403, [])


async def test_without_oauth_challenges_and_paths_are_as_for_keys_alone(start: Start) -> None:
    wire = await start(oauth=OAuthSettings(issuer=ORIGIN, scopes=["jobs:write"]))
    accept(wire)
    for raw in (request("GET", BARE, key=None), bearing(ACCESS)):
        answer = await answer_to(wire, raw)
        assert (answer.status, answer.all("WWW-Authenticate")) == (401, [API_KEY])
    assert (await answer_to(wire, request("GET", BARE))).status == 200
    assert [seen.start for seen in wire.upstream.requests] == [f"GET {BARE} HTTP/1.1"]


# -- the metadata of the resource


@pytest.mark.parametrize("lines", [(), ("Authorization: Bearer x",), ("X-Api-Key: ",), ("Host: a", "X-Other: b")])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_anyone_may_read_the_metadata_before_routes_and_credentials(
    start: Start, method: str, lines: tuple[str, ...]
) -> None:
    wire = await start(oauth=OAUTH, rows=ROWS, tools=TOOLS)
    raw = b"".join(
        b"%b %b HTTP/1.1\r\nHost: any.example\r\n%b\r\n"
        % (
            method.encode(),
            (BARE + path).encode(),
            "".join(f"{line}\r\n" for line in lines if "Host" not in line).encode(),
        )
        for path in ("", "/mcp", "/test")
    )
    found = []
    async with wire.client() as client:
        await client.send(raw)
        for _ in range(3):
            answer = await client.answer(method=method)
            assert (answer.status, answer.one("Access-Control-Allow-Origin")) == (200, "*")
            assert answer.one("Access-Control-Allow-Credentials") is None
            assert (answer.one("Content-Type"), answer.one("Cache-Control")) == ("application/json", "no-store")
            found.append(answer.body and json.loads(answer.body)["resource"])
    live, test = f"{ORIGIN}/mcp", f"{ORIGIN}/test"
    assert found == ([live, live, test] if method == "GET" else [b""] * 3)
    assert wire.upstream.heads == []
    assert {(seen.ending, seen.reason, seen.user) for seen in wire.recorder.seen} == {(Ending.COMPLETED, None, None)}


async def test_preflight_of_the_metadata_has_no_content(start: Start) -> None:
    wire = await start(oauth=OAUTH)
    async with wire.client() as client:
        for _ in range(2):
            await client.send(
                request(
                    "OPTIONS", f"{BARE}/mcp", "Origin: https://a.example", "Access-Control-Request-Method: GET",
                    "Access-Control-Request-Headers: mcp-protocol-version", key=None,
                )
            )  # fmt: skip
            answer = await client.answer()
            assert (answer.status, answer.body, answer.one("Content-Length")) == (204, b"", None)
            assert answer.one("Access-Control-Allow-Origin") == answer.one("Access-Control-Allow-Headers") == "*"
            assert "GET" in (answer.one("Access-Control-Allow-Methods") or "")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "QUERY"])
async def test_other_methods_of_the_metadata_are_not_allowed(start: Start, method: str) -> None:
    wire = await start(oauth=OAUTH)
    answer = await answer_to(wire, request(method, BARE, body=b"{}"))
    assert (answer.status, json.loads(answer.body)["code"]) == (405, "method_not_allowed")
    assert answer.one("Allow") == "GET, HEAD, OPTIONS"
    assert wire.upstream.heads == []
    assert wire.recorder.seen[0].reason is Reason.METHOD_NOT_ALLOWED


@pytest.mark.parametrize(
    "target", [f"{BARE}?a=b", f"{BARE}?", f"{BARE}/", f"{BARE}/mcp/", f"{BARE}/other", f"/a{BARE}"]
)
async def test_no_other_target_is_taken_for_the_metadata(start: Start, target: str) -> None:
    wire = await start(oauth=OAUTH)
    assert (await answer_to(wire, request("GET", target, key=None))).status == 401
    assert (await answer_to(wire, request("GET", target))).status == 200
    assert len(wire.upstream.requests) == 1


async def test_the_metadata_are_found_where_a_challenge_leads_to_also_if_the_resource_is_encoded(start: Start) -> None:
    wire = await start(oauth=OAuthSettings(issuer=ORIGIN, resource=f"{ORIGIN}/%7B1%7D"))
    challenge = (await answer_to(wire, request("GET", "/", key=None))).all("WWW-Authenticate")[0]
    found = challenge.partition(f'resource_metadata="{ORIGIN}')[2].rstrip('"')
    assert found == f"{BARE}/%7B1%7D"
    for target in (found, f"{ORIGIN}{found}"):
        answer = await answer_to(wire, f"GET {target} HTTP/1.1\r\nHost: mcp.example.com\r\n\r\n".encode())
        assert json.loads(answer.body)["resource"] == f"{ORIGIN}/%7B1%7D"
    assert (await answer_to(wire, request("GET", f"{BARE}/{{1}}", key=None))).status in (400, 401)


async def test_resources_with_one_path_on_two_hosts_are_selected_by_host(start: Start) -> None:
    wire = await start(oauth=dataclasses.replace(OAUTH, test_resource="https://test.example.com/mcp"))
    for host, resource in (
        ("mcp.example.com", OAUTH.resource),
        ("Test.Example.com", "https://test.example.com/mcp"),
        ("10.0.0.1:8080", OAUTH.resource),
    ):
        for path in (BARE, f"{BARE}/mcp"):
            answer = await answer_to(wire, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert json.loads(answer.body)["resource"] == resource


# -- tokens


async def test_an_access_token_is_forwarded_with_the_identity_of_its_session(start: Start) -> None:
    wire = await start(oauth=OAUTH)
    accept(wire)
    for _ in range(3):
        assert (await answer_to(wire, bearing(ACCESS, f"Cookie: t={ACCESS.decode()}"))).status == 200
    for seen in wire.upstream.requests:
        assert seen.one("X-Keyproxy-User") == "u_42"
        assert ACCESS.decode() not in str(seen.headers)


@pytest.mark.parametrize(
    "raw",
    [
        bearing(ACCESS, scheme="Api-Key"),
        request("GET", "/", f"X-Api-Key: {ACCESS.decode()}", key=None),
        bearing(ACCESS, f"X-Api-Key: {ACCESS.decode()}"),
        *(bearing(secret, scheme=scheme) for secret in (REFRESH, SECRET) for scheme in ("Bearer", "Api-Key")),
        *(request("GET", "/", f"X-Api-Key: {secret.decode()}", key=None) for secret in (REFRESH, SECRET)),
    ],
)
async def test_a_known_secret_of_oauth_in_the_wrong_place_is_invalid_without_a_lookup(start: Start, raw: bytes) -> None:
    wire = await start(oauth=OAUTH)
    for secret in (ACCESS, REFRESH, SECRET):
        wire.identities.table[hashlib.sha256(secret).digest()] = fakes.identity()  # type: ignore[index]
    wire.identities.is_down = True
    async with wire.client() as client:
        for _ in range(2):  # also once the head is known
            await client.send(raw)
            answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["code"]) == (401, "api_key_invalid")
    assert wire.upstream.heads == []


async def test_a_token_in_the_url_is_refused(start: Start) -> None:
    wire = await start(oauth=OAUTH)
    for target in (f"/{ACCESS.decode()}", f"/?t={REFRESH.decode()}", f"/?access_token={SECRET.decode()}"):
        answer = await answer_to(wire, request("GET", target))
        assert (answer.status, json.loads(answer.body)["code"]) == (400, "key_in_url")


async def test_a_token_acts_for_no_user(start: Start) -> None:
    wire = await start(oauth=OAUTH)
    accept(wire)
    wire.identities.let_act(fakes.FORMAT.make_access_token(bytes(32)), "u_43")
    for user in ("u_43", "u_42", "u_none"):
        answer = await answer_to(wire, bearing(ACCESS, f"X-Keyproxy-Act-For: {user}"))
        assert (answer.status, json.loads(answer.body)["code"]) == (403, "delegation_refused")
    assert wire.upstream.heads == []
    assert {seen.user for seen in wire.recorder.seen} == {"u_42"}


async def test_a_token_mints_no_agent_tokens(start: Start) -> None:
    rows = [RouteRow("POST /agents", scopes=["agents:mint"], serves="agent-tokens")]
    wire = await start(oauth=OAUTH, rows=rows)
    accept(wire, fakes.identity(scopes=frozenset({"agents:mint", "jobs:write"})))
    body = b'{"agent":"a","scopes":["jobs:write"]}'
    raw = request("POST", "/agents", f"Authorization: Bearer {ACCESS.decode()}", body=body, key=None)
    answer = await answer_to(wire, raw)
    problem = json.loads(answer.body)
    assert (answer.status, problem["code"]) == (403, "delegation_refused")
    assert problem["detail"] == "An OAuth access token cannot mint agent tokens. Use an API key."
    assert wire.mint.calls == []


async def test_a_bound_token_needs_the_connection_with_its_certificate(start: Start) -> None:
    authority, serving = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(serving)
    authority.configure_trust(serving)
    serving.verify_mode = ssl.CERT_OPTIONAL
    own, other = authority.issue_cert("worker"), authority.issue_cert("other")
    wire = await start(oauth=OAUTH, tls=serving)
    der = ssl.PEM_cert_to_DER_cert(own.cert_chain_pems[0].bytes().decode())
    accept(wire, bound_to=hashlib.sha256(der).digest())
    statuses = []
    for certificate in (own, other, None):
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if certificate is not None:
            certificate.configure_cert(context)
        async with connect(wire.address, tls=context) as client:
            await client.send(bearing(ACCESS))
            answer = await client.answer()
            statuses.append((answer.status, answer.status == 200 or json.loads(answer.body)["code"]))
    assert statuses == [(200, True), (401, "api_key_invalid"), (401, "api_key_invalid")]
    assert len(wire.upstream.heads) == 1


async def test_an_open_stream_ends_once_its_token_is_bound_to_another_certificate(start: Start) -> None:
    wire = await start(oauth=OAUTH, serving=Upstream(stream))
    accept(wire)
    async with wire.client() as client:
        await client.send(bearing(ACCESS))
        await client.reader.readuntil(b"data: 1")
        accept(wire, bound_to=bytes(32))
        await client.ends(seconds=REVOKED_SECONDS)
    assert wire.recorder.seen[0].ending is Ending.CUT


def test_tools_may_demand_oauth_tokens_only_where_they_occur() -> None:
    """Nothing could call such a tool otherwise."""
    tools = (ToolRow("search", credentials=["oauth"]),)
    assert Settings(tools=tools, oauth=OAUTH).tools == tools


async def test_a_tool_for_oauth_tokens_is_refused_to_keys(start: Start) -> None:
    tools = [ToolRow("search", credentials=["oauth"])]
    wire = await start(oauth=OAUTH, rows=[RouteRow("GET /tool", tool="search")], tools=tools)
    accept(wire)
    assert (await answer_to(wire, bearing(ACCESS, target="/tool"))).status == 200
    answer = await answer_to(wire, bearing(KEY, target="/tool"))
    assert (answer.status, json.loads(answer.body)["missing"]) == (403, "credential")
