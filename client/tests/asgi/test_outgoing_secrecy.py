"""Where the secret and the acting user of an outgoing request do not appear, and that responses stay as they came."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import pickle
from collections.abc import Iterator
from typing import Any

import aiohttp
import httpx
import pytest
import requests

from keyproxy_client import http, keys
from outgoing_clients import Call, Client
from scripted_server import ScriptedServer, refusal

KEY = keys.make(entropy=b"\1" * 32)


def options(origin: ScriptedServer) -> dict[str, Any]:
    """The options of a client."""
    return {"origin": origin.origin, "key": KEY, "act_for": "u_42"}


def test_request_of_httpx_shows_its_credential_only_in_raw(origin: ScriptedServer) -> None:
    with http.httpx_client(**options(origin), headers={"X-Own": "1"}) as client:
        request = client.get("/").request
    headers = request.headers
    assert (b"Authorization", f"Api-Key {KEY}".encode()) in headers.raw
    assert (b"X-Keyproxy-Act-For", b"u_42") in headers.raw
    assert headers["x-own"] == "1"
    copies = [headers.copy(), copy.copy(headers), copy.deepcopy(headers), pickle.loads(pickle.dumps(headers))]
    copies += [httpx.Headers(headers), httpx.Headers(dict(headers)), httpx.Headers(list(headers.items()))]
    for one in copies:
        assert not {name.lower() for name, _ in one.raw} & {b"authorization", b"x-keyproxy-act-for"}
        assert one["x-own"] == "1"
    for text in (repr(headers), str(dict(headers)), repr(request), repr(client.auth)):
        assert KEY not in text
    assert KEY.encode() not in pickle.dumps(request)


def test_request_of_requests_shows_no_secret_in_repr_and_pickles(origin: ScriptedServer) -> None:
    with http.requests_session(**options(origin)) as session:
        response = session.get("/", timeout=10)
        with pytest.raises(requests.ConnectionError) as raised:
            requests.get("http://127.0.0.1:1/", auth=http.KeyproxyAuth("http://127.0.0.1:1", KEY, "u_42"), timeout=10)
    for request in (response.request, raised.value.request):
        assert request is not None
        assert KEY not in repr(request.headers)
        assert KEY.encode() not in pickle.dumps(request)
    assert KEY.encode() not in pickle.dumps(response)
    assert pickle.loads(pickle.dumps(response)).request.url == f"{origin.origin}/"


def test_request_of_httpx_that_leaves_the_origin_after_its_authentication_is_not_sent(
    origin: ScriptedServer, elsewhere: ScriptedServer
) -> None:
    def divert(request: httpx.Request) -> None:
        request.url = httpx.URL(f"{elsewhere.origin}/")

    async def divert_async(request: httpx.Request) -> None:
        divert(request)

    class Diverting(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            divert(request)
            return super().handle_request(request)

    async def hooked() -> None:
        async with http.httpx_async_client(**options(origin), event_hooks={"request": [divert_async]}) as client:
            await client.get("/")

    def again(client: httpx.Client) -> None:
        with http.httpx_client(**options(origin)) as first:
            request = first.get("/").request
        divert(request)
        client.send(request, auth=None)

    for send in (
        lambda: http.httpx_client(**options(origin), event_hooks={"request": [divert]}).get("/"),
        lambda: asyncio.run(hooked()),
        lambda: http.httpx_client(**options(origin), transport=Diverting()).get("/"),
        lambda: again(httpx.Client()),
    ):
        with pytest.raises(http.WrongOrigin):
            send()
    assert elsewhere.received == []


def test_request_of_requests_that_leaves_the_origin_after_its_authentication_is_not_sent(
    origin: ScriptedServer, elsewhere: ScriptedServer
) -> None:
    with http.requests_session(**options(origin)) as session:
        prepared = session.prepare_request(requests.Request("GET", "/"))
        repeated = session.get("/", timeout=10).request.copy()
        for request in (prepared, repeated):
            request.url = f"{elsewhere.origin}/"
            with pytest.raises(http.WrongOrigin):
                session.send(request, timeout=10)
    assert elsewhere.received == []


def local_variables(error: BaseException | None) -> Iterator[str]:
    """What a tool may report that collects the local variables of an exception and its causes. Bytes show as text."""
    while error is not None:
        frame = error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_globals is not globals():
                yield from map(str, frame.tb_frame.f_locals.values())
            frame = frame.tb_next
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("act_for", ["u_42", None])
def test_local_variables_of_a_failed_connection_hold_no_secret(act_for: str | None) -> None:
    refused: dict[str, Any] = {"origin": "http://127.0.0.1:1", "key": KEY, "act_for": act_for}

    async def with_aiohttp() -> None:
        async with aiohttp.ClientSession(middlewares=[http.keyproxy_middleware(**refused)]) as session:
            await session.get("http://127.0.0.1:1/")

    async def with_httpx() -> None:
        async with http.httpx_async_client(**refused) as client:
            await client.get("/")

    for send in (
        lambda: http.httpx_client(**refused).get("/"),
        lambda: asyncio.run(with_httpx()),
        lambda: http.requests_session(**refused).get("/", timeout=10),
        lambda: asyncio.run(with_aiohttp()),
    ):
        with pytest.raises((httpx.ConnectError, requests.ConnectionError, aiohttp.ClientConnectorError)) as raised:
            send()
        assert [text for text in local_variables(raised.value) if KEY in text] == []


def test_response_and_error_of_aiohttp_show_no_secret(origin: ScriptedServer) -> None:
    async def run() -> list[str]:
        middleware = http.keyproxy_middleware(**options(origin))
        async with aiohttp.ClientSession(origin.origin, middlewares=[middleware]) as session:
            async with session.get("/") as response:
                found = [repr(response), repr(response.request_info), repr(response.request_info.headers)]
            origin.script(refusal(500, "internal_error"))
            with pytest.raises(aiohttp.ClientResponseError) as refused:
                await session.get("/", raise_for_status=True)
        with pytest.raises(aiohttp.ClientConnectorError) as failed:
            async with aiohttp.ClientSession(
                middlewares=[http.keyproxy_middleware("http://127.0.0.1:1", KEY, "u_42")]
            ) as session:
                await session.get("http://127.0.0.1:1/")
        return [*found, repr(refused.value), repr(failed.value), repr(middleware)]

    assert [text for text in asyncio.run(run()) if KEY in text] == []


def test_handshake_of_a_websocket_is_authenticated_and_its_error_shows_no_secret(origin: ScriptedServer) -> None:
    async def run() -> BaseException:
        middleware = http.keyproxy_middleware(**options(origin))
        async with aiohttp.ClientSession(middlewares=[middleware]) as session:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(f"{origin.origin.replace('http', 'ws')}/events")
            with pytest.raises(http.WrongOrigin):
                await session.ws_connect(f"{origin.origin.replace('http', 'wss')}/events")
        return refused.value

    assert KEY not in repr(asyncio.run(run()))
    assert [sent.credentials for sent in origin.received] == [([f"Api-Key {KEY}"], ["u_42"])]


def test_auth_object_is_never_serialised() -> None:
    auth = http.KeyproxyAuth("http://localhost", KEY, "u_42")
    with pytest.raises(TypeError, match="secret"):
        pickle.dumps(auth)
    assert KEY not in repr(auth)


def test_stream_of_httpx_is_untouched_after_its_refusal_was_examined(origin: ScriptedServer) -> None:
    reply = refusal(429, "of_the_upstream")
    for read in (
        lambda response: b"".join(response.iter_raw()),
        lambda response: b"".join(response.iter_bytes()),
        lambda response: "".join(response.iter_lines()).encode(),
        lambda response: response.read(),
    ):
        origin.script(reply)
        with http.httpx_client(**options(origin)) as client, client.stream("GET", "/") as response:
            assert (read(response), response.status_code) == (reply.body, 429)


def test_stream_of_an_asynchronous_httpx_is_untouched_too(origin: ScriptedServer) -> None:
    reply = refusal(429, "of_the_upstream")

    async def run() -> bytes:
        async with http.httpx_async_client(**options(origin)) as client, client.stream("GET", "/") as response:
            return b"".join([part async for part in response.aiter_raw()])

    origin.script(reply)
    assert asyncio.run(run()) == reply.body


def test_stream_of_requests_and_aiohttp_can_be_read_after_its_refusal_was_examined(origin: ScriptedServer) -> None:
    reply = refusal(429, "of_the_upstream")
    origin.script(reply, reply)
    with http.requests_session(**options(origin)) as session, session.get("/", stream=True, timeout=10) as response:
        assert b"".join(response.iter_content(7)) == reply.body

    async def run() -> Any:
        middleware = http.keyproxy_middleware(**options(origin))
        async with (
            aiohttp.ClientSession(origin.origin, middlewares=[middleware]) as session,
            session.get("/") as response,
        ):
            return await response.json(content_type=None)

    assert asyncio.run(run()) == json.loads(reply.body)


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_form_with_a_file_is_sent_again_from_its_start_by_httpx(origin: ScriptedServer, is_asynchronous: bool) -> None:
    files = {"upload": ("name", io.BytesIO(b"content"))}

    async def post() -> int:
        async with http.httpx_async_client(**options(origin)) as client:
            return (await client.post("/", files=files)).status_code

    origin.script(refusal())
    if is_asynchronous:
        assert asyncio.run(post()) == 200
    else:
        with http.httpx_client(**options(origin)) as client:
            assert client.post("/", files=files).status_code == 200
    first, second = (sent.body for sent in origin.received)
    assert first == second
    assert b"content" in first


def test_repetition_uses_the_same_connection(client: Client, origin: ScriptedServer) -> None:
    origin.script(refusal())
    assert client(Call("/", "POST", b"body"), options(origin)).status == 200
    assert len({sent.client_port for sent in origin.received}) == 1
    assert len(origin.received) == 2


def test_unencrypted_origin_is_never_reached_through_a_proxy_of_the_environment(
    origin: ScriptedServer, elsewhere: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, elsewhere.origin)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with http.httpx_client(**options(origin)) as client, http.requests_session(**options(origin)) as session:
        assert client.get("/").status_code == session.get("/", timeout=10).status_code == 200
    assert (len(origin.received), elsewhere.received) == (2, [])
