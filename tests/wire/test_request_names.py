"""Which of a client's headers go upstream, by their names: over sockets, to a server that folds `_`, `.` and `-`."""

from __future__ import annotations

import json

import pytest

from keyproxy.ai.models import Model
from keyproxy.config.schema import IdentityHeaders, RouteRow, Settings
from keyproxy.process.terms import build_terms
from tests.rawhttp import Upstream, answer_with
from tests.wire.conftest import KEY, Start, request

TEXT = KEY.decode()
OVERRIDES = (
    "X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "X-Original-URL", "X-Original-URI",
    "X-Original-Method", "X-Rewrite-URL", "X-Override-URL",
)  # fmt: skip

#: Fields that end here or are set here, exactly spelled.
OURS = (
    "X-Keyproxy-User", "X-Keyproxy-Model", "X-Request-Id", "X-Forwarded-For", "X-Forwarded-Anything", "X-Real-Ip",
    "Proxy-Authorization", "Keep-Alive", "Proxy-Connection", "Http2-Settings", "Proxy-Authenticate",
)  # fmt: skip
FRAMING = ("Content-Length", "Transfer-Encoding", "Content-Type", "Content-Encoding")


def spellings(name: str) -> list[str]:
    """The name with each separator, mixed, and in other cases."""
    found = [name.replace("-", sign) for sign in "_."]
    found += [name.replace("-", "_", 1), name.replace("-", ".", 1), name.replace("-", "_").upper()]
    return [*found, name.replace("-", ".").lower()]


def folded(name: str) -> str:
    """The name as a CGI, WSGI or PHP program sees it."""
    return name.upper().replace("-", "_").replace(".", "_")


@pytest.mark.parametrize("name", [*OURS, *OVERRIDES])
async def test_a_name_of_ours_in_another_spelling_does_not_reach_a_server_that_folds_names(
    start: Start, name: str
) -> None:
    wire = await start(listen={"trusted_proxies": ["127.0.0.1"]})
    async with wire.client() as client:
        for spelling in spellings(name):
            await client.send(request("POST", "/", f"{spelling}: evil", "X-Kept: 1", body=b"x"))
            assert (await client.answer()).status == 200
    for seen in wire.upstream.requests:
        values = [value for one, value in seen.headers if folded(one) == folded(name)]
        assert not any("evil" in value for value in values)
        assert len(values) <= 1
        assert seen.one("X-Kept") == "1"


@pytest.mark.parametrize("name", ["X_Custom", "X.Custom", "x_a.b-c", "Host_", "Idempotency_Key", "X_Usage_Tokens"])
async def test_another_name_is_forwarded_as_it_is_spelled(start: Start, name: str) -> None:
    wire = await start()
    async with wire.client() as client:
        for number in range(12):
            await client.send(request("POST", "/", f"{name}: {number}", body=b"x"))
            assert (await client.answer()).status == 200
    assert [seen.one(name) for seen in wire.upstream.requests] == [str(number) for number in range(12)]
    assert all(name in [one for one, _ in seen.headers] for seen in wire.upstream.requests)


@pytest.mark.parametrize("name", FRAMING)
async def test_a_framing_name_in_another_spelling_refuses_the_request(start: Start, name: str) -> None:
    wire = await start()
    for spelling in spellings(name):
        async with wire.client() as client:
            await client.send(request("POST", "/", f"{spelling}: 1", body=b"x"))
            assert json.loads((await client.answer()).body)["code"] == "request_malformed"
    assert wire.upstream.heads == []


@pytest.mark.parametrize("name", ["X!A", "X~A", "X|A", "X'A", "X+A", "X-Keyproxy-Us!er"])
async def test_a_name_with_any_other_character_refuses_the_request(start: Start, name: str) -> None:
    wire = await start()
    async with wire.client() as client:
        await client.send(request("POST", "/", f"{name}: 1", body=b"x"))
        assert (await client.answer()).status == 400


@pytest.mark.parametrize("name", ["X_Api_Key", "X.Api.Key", "x-api_key"])
async def test_a_credential_in_another_spelling_is_none(start: Start, name: str) -> None:
    wire = await start()
    async with wire.client() as client:
        await client.send(request("POST", "/", f"{name}: {TEXT}", key=None, body=b"x"))
        assert json.loads((await client.answer()).body)["code"] == "api_key_missing"
        await client.send(request("POST", "/", f"{name}: other", body=b"x"))
        assert (await client.answer()).status == 200
    (seen,) = wire.upstream.requests
    assert [one for one, _ in seen.headers if folded(one) == "X_API_KEY"] == []


@pytest.mark.parametrize("forwards", [False, True])
async def test_overrides_reach_the_upstream_only_if_configured(start: Start, forwards: bool) -> None:
    wire = await start()
    server = wire.server
    settings = Settings(listen=server.listen, identity=IdentityHeaders(forward_overrides=forwards))
    server.change(build_terms(settings, server.routes, wire.gateway, server.upstreams, tls=None), None)
    names = [*OVERRIDES, "X_Http_Method_Override", "X.Original.Url"]
    async with wire.client() as client:
        for _ in range(12):
            await client.send(request("POST", "/", *[f"{name}: DELETE" for name in names], body=b"x"))
            assert (await client.answer()).status == 200
    for seen in wire.upstream.requests:
        assert {name: seen.one(name) for name in names} == dict.fromkeys(names, "DELETE" if forwards else None)


@pytest.mark.parametrize("option", ["X_Mine", "x.mine", "X-Mine"])
@pytest.mark.parametrize("name", ["X-Mine", "X_Mine", "X.Mine"])
async def test_connection_options_name_fields_in_any_spelling(start: Start, option: str, name: str) -> None:
    wire = await start()
    async with wire.client() as client:
        for _ in range(10):
            await client.send(request("POST", "/", f"Connection: {option}", f"{name}: 1", "X-Other: 2", body=b"x"))
            assert (await client.answer()).status == 200
    assert [(seen.one(name), seen.one("X-Other")) for seen in wire.upstream.requests] == [(None, "2")] * 10


@pytest.mark.parametrize("option", ["content_length", "Transfer.Encoding", "content_type"])
async def test_connection_must_not_name_a_framing_field_in_any_spelling(start: Start, option: str) -> None:
    wire = await start()
    async with wire.client() as client:
        await client.send(request("POST", "/", f"Connection: {option}", body=b"x"))
        assert (await client.answer()).status == 400


async def test_names_in_responses_are_not_restricted(start: Start) -> None:
    fields = ["X_Api_Key: a", "X-HTTP-Method: b", "X.Custom: c", "Content_Type: d", "Keep.Alive: e", "X_Mine: f"]
    head = "\r\n".join(["HTTP/1.1 200 OK", "Content-Length: 0", "Connection: x-mine", *fields]) + "\r\n\r\n"
    wire = await start(serving=Upstream(answer_with(head.encode())))
    async with wire.client() as client:
        for _ in range(10):
            await client.send(request("POST", "/", body=b"x"))
            answer = await client.answer()
            names = [line.partition(":")[0] for line in fields]
            assert [answer.one(name) for name in names] == ["a", "b", "c", "d", "e", None]


# -- encoded slashes


ROWS = [
    RouteRow("GET /v1/files/{id}", encoded_slash="forward"),
    RouteRow("GET /v1/files/{id}/meta", ["never"]),
    RouteRow("GET /public/{id}", access="public"),
]


@pytest.mark.parametrize(
    ("path", "with_key", "without_key"),
    [
        ("/v1/files/a%2Fb", 200, 401),
        ("/v1/files/a%2fb?x=%2F..%2F", 200, 401),
        ("/v1/files/a%2Fmeta", 400, 401),
        ("/v1/files/a%2F..%2Fb", 400, 401),
        ("/elsewhere/a%2Fb", 403, 401),
        ("/public/a%2Fb", 400, 401),
        ("/v1/files/a%252Fb", 400, 400),
        ("/v1/files/a%5Cb", 400, 400),
    ],
)
async def test_an_encoded_slash_is_judged_at_the_route_and_forwarded_as_sent(
    start: Start, path: str, with_key: int, without_key: int
) -> None:
    wire = await start(rows=ROWS)
    for key, status in ((KEY, with_key), (None, without_key)):
        for _ in range(3):
            async with wire.client() as client:
                await client.send(request("GET", path, key=key))
                assert (await client.answer(method="GET")).status == status
    assert [seen.start for seen in wire.upstream.requests] == [f"GET {path} HTTP/1.1"] * (3 if with_key == 200 else 0)


@pytest.mark.parametrize("key", [KEY, None])
async def test_without_a_route_that_forwards_them_they_are_refused_before_credentials(
    start: Start, key: bytes | None
) -> None:
    wire = await start(rows=[RouteRow("GET /v1/files/{id}")])
    async with wire.client() as client:
        await client.send(request("GET", "/v1/files/a%2Fb", key=key))
        assert (await client.answer(method="GET")).status == 400


@pytest.mark.parametrize("path", ["/v1/models/org%2Fname:run", "/v1/models/%6Frg%2fname:run"])
async def test_a_model_in_the_path_is_read_decoded(start: Start, path: str) -> None:
    row = RouteRow("POST /v1/models/{model}:run", tokens="openai", model="path:model", encoded_slash="forward")
    wire = await start(rows=[row], models=[Model("org/name")])
    async with wire.client() as client:
        await client.send(request("POST", path, body=b'{"max_tokens":1,"messages":[]}'))
        assert (await client.answer()).status == 200
    (seen,) = wire.upstream.requests
    assert seen.start == f"POST {path} HTTP/1.1"
    assert wire.recorder.seen[-1].model == "org/name"


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["X-Model: m"], 200),
        (["x-model: m", "X-Models: n", "X_Modell: n"], 200),
        (["X_Model: m"], 400),
        (["X-Model: m", "X.Model: n"], 400),
        (["X-Model: m", "X-Model: m"], 400),
    ],
)
async def test_a_model_in_a_header_has_one_spelling(start: Start, lines: list[str], status: int) -> None:
    row = RouteRow("POST /v1/chat/completions", tokens="openai", model="header:X-Model")
    wire = await start(rows=[row], models=[Model("m")])
    async with wire.client() as client:
        await client.send(request("POST", "/v1/chat/completions", *lines, body=b'{"max_tokens":1,"messages":[]}'))
        assert (await client.answer()).status == status
    assert wire.recorder.seen[-1].model == ("m" if status == 200 else "")


@pytest.mark.parametrize("path", [f"/v1/files/a%2F{TEXT}", f"/v1/files/{TEXT.replace('_', '%5f')}%2Fb"])
async def test_a_key_beside_an_encoded_slash_is_found(start: Start, path: str) -> None:
    wire = await start(rows=ROWS)
    async with wire.client() as client:
        await client.send(request("GET", path))
        assert json.loads((await client.answer(method="GET")).body)["code"] == "key_in_url"
