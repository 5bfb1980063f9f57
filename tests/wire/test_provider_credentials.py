"""The credential of an upstream on the wire: it replaces the client's lines, and a 401 is relayed once and remembered."""

from __future__ import annotations

import asyncio
import json

import pytest

from keyproxy.config.schema import RouteRow
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.http.headers import without_field
from keyproxy.ports.tools import UpstreamCredential
from keyproxy.store.provider_keys.credential_header import CredentialHeader
from tests.rawhttp import Message, Upstream, answer_with
from tests.wire.conftest import KEY, Start, request

ROWS = [
    RouteRow("POST /v1/ai/jobs", provider="openai"),
    RouteRow("POST /azure", provider="azure"),
    RouteRow("POST /plain"),
]


def lines(message: Message) -> bytes:
    """The header lines of a request as the upstream has received them."""
    return b"\r\n" + b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in message.headers)


def bearer(secret: str) -> UpstreamCredential:
    """A credential in Authorization."""
    return CredentialHeader("openai", "Authorization", "Bearer {secret}").credential(secret.encode())


async def test_credential_goes_upstream_in_place_of_the_clients(start: Start) -> None:
    wire = await start(rows=ROWS)
    wire.upstream_credentials.table["openai"] = [bearer("sk-1")]
    async with wire.client() as client:
        await client.send(request(body=b"{}"))
        assert (await client.answer()).status == 200
    head = lines(wire.upstream.requests[-1])
    assert head.count(b"\r\nAuthorization: Bearer sk-1\r\n") == 1
    assert KEY not in head
    assert wire.upstream_credentials.asked == [("openai", "acme", False)]


@pytest.mark.parametrize("name", ["api-key", "API-Key", "Api_Key", "api.key", "aPi_KeY"])
async def test_client_cannot_add_the_header_in_any_spelling(start: Start, name: str) -> None:
    wire = await start(rows=ROWS)
    wire.upstream_credentials.table["azure"] = [CredentialHeader("azure", "api-key", "{secret}").credential(b"az-1")]
    async with wire.client() as client:
        for _ in range(12):  # beyond the number of heads after which a shape is learnt
            await client.send(request("POST", "/azure", f"{name}: forged", "X-Other: 1", f"{name}: again", body=b"{}"))
            assert (await client.answer()).status == 200
            head = lines(wire.upstream.requests[-1])
            assert b"forged" not in head
            assert b"again" not in head
            assert head.count(b"api-key: az-1\r\n") == 1
            assert b"X-Other: 1\r\n" in head


async def test_clients_header_stays_on_routes_without_the_provider(start: Start) -> None:
    wire = await start(rows=ROWS)
    wire.upstream_credentials.table["azure"] = [CredentialHeader("azure", "api-key", "{secret}").credential(b"az-1")]
    async with wire.client() as client:
        await client.send(request("POST", "/plain", "api-key: mine", body=b"{}"))
        assert (await client.answer()).status == 200
    head = lines(wire.upstream.requests[-1])
    assert b"api-key: mine\r\n" in head
    assert b"az-1" not in head


async def test_connection_option_cannot_remove_the_credential(start: Start) -> None:
    wire = await start(rows=ROWS)
    wire.upstream_credentials.table["azure"] = [CredentialHeader("azure", "api-key", "{secret}").credential(b"az-1")]
    async with wire.client() as client:
        await client.send(request("POST", "/azure", "Connection: api-key", "api-key: mine", body=b"{}"))
        assert (await client.answer()).status == 200
    assert lines(wire.upstream.requests[-1]).count(b"api-key: az-1\r\n") == 1


async def test_401_is_relayed_and_the_next_request_uses_the_other_secret(start: Start) -> None:
    refusing = Upstream(answer_with(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"))
    wire = await start(rows=ROWS, serving=refusing)
    new, old = bearer("sk-new"), bearer("sk-old")
    wire.upstream_credentials.table["openai"] = [new, old]
    async with wire.client() as client:
        await client.send(request(body=b"{}"))
        answer = await client.answer()
        assert (answer.status, answer.body) == (401, b"no")
        assert len(wire.upstream.requests) == 1  # never sent twice
        await client.send(request(body=b"{}"))
        assert (await client.answer()).status == 401
        await client.send(request("POST", "/plain", body=b"{}"))
        assert (await client.answer()).status == 401
    assert b"sk-new" in lines(wire.upstream.requests[0])
    assert b"sk-old" in lines(wire.upstream.requests[1])
    assert wire.upstream_credentials.refused == [new, old]


async def test_without_a_credential_nothing_is_sent_and_nothing_is_charged(start: Start) -> None:
    wire = await start(rows=ROWS)
    async with wire.client() as client:
        await client.send(request(body=b"{}"))
        answer = await client.answer()
    assert answer.status == 503
    assert json.loads(answer.body)["code"] == "upstream_credential_unavailable"
    assert answer.one("Retry-After") == "60"
    assert wire.upstream.requests == []


async def test_credential_that_is_not_in_memory_is_fetched_first(start: Start) -> None:
    wire = await start(rows=ROWS)
    wire.upstream_credentials.table["openai"] = [bearer("sk-1")]
    wire.upstream_credentials.slow.add("openai")
    async with asyncio.timeout(10.0), wire.client() as client:
        await client.send(request(body=b"{}"))
        assert (await client.answer()).status == 200
    assert b"Authorization: Bearer sk-1\r\n" in lines(wire.upstream.requests[-1])


async def test_missing_credential_neither_burns_an_approval_nor_requests_one(start: Start) -> None:
    row = RouteRow("POST /pay", tool="transfer", provider="openai")
    wire = await start(rows=[row], tools=[ToolRow("transfer", approval="human")])
    async with wire.client() as client:
        await client.send(request("POST", "/pay", body=b"{}"))
        assert json.loads((await client.answer()).body)["code"] == "upstream_credential_unavailable"
        assert not wire.approvals.pending
        wire.upstream_credentials.table["openai"] = [bearer("sk-1")]
        await client.send(request("POST", "/pay", body=b"{}"))
        assert json.loads((await client.answer()).body)["code"] == "approval_required"
        wire.approvals.approve()
        wire.upstream_credentials.table.clear()
        await client.send(request("POST", "/pay", body=b"{}"))
        assert (await client.answer()).status == 503
        assert wire.approvals.approved
        wire.upstream_credentials.table["openai"] = [bearer("sk-1")]
        await client.send(request("POST", "/pay", body=b"{}"))
        assert (await client.answer()).status == 200
    assert len(wire.upstream.requests) == 1
    assert b"Authorization: Bearer sk-1\r\n" in lines(wire.upstream.requests[0])


async def test_refused_tool_is_refused_before_a_credential_is_sought(start: Start) -> None:
    row = RouteRow("POST /pay", tool="transfer", provider="openai")
    wire = await start(rows=[row], tools=[ToolRow("transfer", scopes=["pay:now"])])
    async with wire.client() as client:
        await client.send(request("POST", "/pay", body=b"{}"))
        assert json.loads((await client.answer()).body)["code"] == "tool_not_allowed"
    assert wire.upstream_credentials.asked == []


async def test_changed_body_of_a_metered_route_goes_upstream_with_the_credential_alone(start: Start) -> None:
    row = RouteRow("POST /v1/chat/completions", tokens="openai", cap="insert", provider="azure")
    wire = await start(rows=[row])
    wire.upstream_credentials.table["azure"] = [CredentialHeader("azure", "api-key", "{secret}").credential(b"az-1")]
    body = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}).encode()
    fields = ("Content-Type: application/json", "Api_Key: forged", "api-key: forged")
    async with wire.client() as client:
        await client.send(request("POST", "/v1/chat/completions", *fields, body=body))
        assert (await client.answer()).status == 200
    sent = wire.upstream.requests[-1]
    assert sent.all("api-key") == ["az-1"]
    assert b"forged" not in lines(sent)


async def test_handshake_goes_upstream_with_the_credential(start: Start) -> None:
    wire = await start(rows=[RouteRow("GET /live", provider="openai")])
    wire.upstream_credentials.table["openai"] = [bearer("sk-1")]
    async with wire.client() as client:
        fields = (
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {'A' * 22}==",
        )
        await client.send(request("GET", "/live", *fields))
        await client.answer(method="GET")
    assert wire.upstream.heads[-1].all("Authorization") == ["Bearer sk-1"]
    assert wire.upstream.heads[-1].one("Upgrade") == "websocket"


@pytest.mark.parametrize(
    ("block", "left"),
    [
        (b"", b""),
        (b"A: 1\r\n", b"A: 1\r\n"),
        (b"A: api-key\r\n", b"A: api-key\r\n"),
        (b"api-key: 1\r\nB: 2\r\n", b"B: 2\r\n"),
        (b"A: 1\r\nAPI_KEY:2\r\nB: 3\r\n", b"A: 1\r\nB: 3\r\n"),
        (b"x-api-key: 1\r\napi-key-2: 1\r\n", b"x-api-key: 1\r\napi-key-2: 1\r\n"),
    ],
)
def test_only_lines_of_the_name_are_dropped(block: bytes, left: bytes) -> None:
    assert without_field(block, b"api-key") == left
