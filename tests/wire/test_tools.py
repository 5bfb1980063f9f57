"""Calls of tools, on HTTP and on MCP routes: which are forwarded, as what, and which are refused without being sent."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from keyproxy.ai.tools.tool_call import ToolClaim
from keyproxy.config.schema import RouteRow
from keyproxy.config.tools.tool_settings import McpSettings, ToolRow
from keyproxy.model import AgentToken, Ending, TimeBudget
from keyproxy.ports.tools import ApprovalRequest
from keyproxy.reasons import Reason
from keyproxy.wire import tls
from tests import fakes
from tests.rawhttp import Message, Upstream, answer_with, read_head
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request

PATH, MCP_PATH = "/v1/tool", "/mcp"
READ = ToolRow("read", scopes=["data:read"])
WRITE = ToolRow("crm.update", "update_contact", scopes=["data:write"], credentials=["oauth", "agent"])
PARTNER = ToolRow("call_partner", scopes=["external:invoke"], client_certificate=True)
ASKED = ToolRow("transfer", scopes=["pay:now"], approval="human")
CONSENTED = ToolRow("mail", approval="consent")
TOOLS = (READ, WRITE, PARTNER, ASKED, CONSENTED)
ALL_SCOPES = frozenset({"data:read", "data:write", "external:invoke", "pay:now"})
JSON = "Content-Type: application/json"


async def calling(start: Start, tool: str = "", **options: Any) -> Wire:
    """A proxy with one HTTP route that calls a tool, and one MCP route."""
    scopes = options.pop("scopes", ALL_SCOPES)
    row = options.pop("row", {})
    rows = [
        RouteRow(f"* {PATH}", name="tool", tool=tool, **row),
        RouteRow(f"* {MCP_PATH}", name="mcp", protocol="mcp", scopes=options.pop("mcp_scopes", [])),
        RouteRow("* /plain", name="plain"),
    ]
    wire = await start(rows=rows, tools=TOOLS, **options)
    wire.identities.add(fakes.key(1), fakes.identity(scopes=scopes))
    return wire


def as_agent(wire: Wire, scopes: frozenset[str] = ALL_SCOPES) -> None:
    found = fakes.identity(scopes=scopes)
    wire.identities.add(fakes.key(1), dataclasses.replace(found, agent_token=AgentToken("agt_1", ("bot",), 0)))


async def ask(wire: Wire, method: str = "POST", target: str = PATH, *lines: str, body: bytes = b"{}") -> Message:
    async with wire.client() as client:
        await client.send(request(method, target, *(lines or (JSON,)), body=body))
        return await client.answer(method=method, seconds=20)


def message(method: str = "tools/call", *, id: object = 7, **params: object) -> bytes:  # noqa: A002 - as in JSON-RPC
    return json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode()


async def call(wire: Wire, tool: str, **arguments: object) -> Message:
    return await ask(wire, "POST", MCP_PATH, JSON, body=message(name=tool, arguments=arguments))


def problem(answer: Message) -> dict[str, Any]:
    """The problem, also from the data of a JSON-RPC error."""
    content: dict[str, Any] = json.loads(answer.body)
    return content["error"]["data"] if "error" in content else content


async def test_call_that_is_allowed_goes_upstream_with_the_label_of_its_tool(start: Start) -> None:
    wire = await calling(start, "read")
    assert (await ask(wire)).status == 200
    assert (await call(wire, "read")).status == 200
    as_agent(wire)
    assert (await call(wire, "update_contact")).status == 200
    assert [one.one("X-Keyproxy-Tool") for one in wire.upstream.requests] == ["read", "read", "crm.update"]
    assert [one.one("X-Keyproxy-Approval") for one in wire.upstream.requests] == [None] * 3


async def test_tool_and_approval_of_the_client_are_dropped_in_any_spelling(start: Start) -> None:
    wire = await calling(start, "read")
    names = ("X-Keyproxy-Tool", "x-keyproxy-approval", "X_Keyproxy_Tool", "X-Keyproxy.Approval", "X-KEYPROXY-TOOL")
    lines = [f"{name}: forged" for name in names]
    assert (await ask(wire, "POST", PATH, JSON, *lines)).status == 200
    assert (await ask(wire, "POST", "/plain", JSON, *lines)).status == 200
    body = message("tools/list")
    assert (await ask(wire, "POST", MCP_PATH, JSON, *lines, body=body)).status == 200
    assert not [value for one in wire.upstream.requests for _, value in one.headers if value == "forged"]
    assert [one.one("X-Keyproxy-Tool") for one in wire.upstream.requests] == ["read", None, None]


@pytest.mark.parametrize(
    ("tool", "name", "scopes", "is_agent", "missing"),
    [
        ("read", "read", frozenset(), False, "scope"),
        ("crm.update", "update_contact", ALL_SCOPES, False, "credential"),
        ("crm.update", "update_contact", frozenset(), False, "credential"),
        ("crm.update", "update_contact", frozenset({"data:read"}), True, "scope"),
        ("call_partner", "call_partner", ALL_SCOPES, True, "client_certificate"),
        ("call_partner", "call_partner", frozenset(), False, "client_certificate"),
        ("transfer", "transfer", frozenset(), False, "scope"),
    ],
)  # fmt: skip
async def test_call_without_what_its_tool_requires_is_refused_and_not_sent(
    start: Start, tool: str, name: str, scopes: frozenset[str], is_agent: bool, missing: str
) -> None:
    wire = await calling(start, tool, scopes=scopes)
    if is_agent:
        as_agent(wire, scopes)
    for answer in (await ask(wire), await call(wire, name)):
        assert answer.status == 403
        assert (problem(answer)["code"], problem(answer)["missing"]) == ("tool_not_allowed", missing)
        assert (answer.one("WWW-Authenticate") is not None) is (missing == "scope")
    assert not wire.upstream.requests
    assert [one.reason for one in wire.recorder.seen] == [Reason.TOOL_NOT_ALLOWED] * 2


async def test_tool_without_a_row_is_refused_also_under_the_label_of_another_name(start: Start) -> None:
    wire = await calling(start)
    as_agent(wire)
    for name in ("delete_everything", "crm.update", "Read", "read ", "READ"):
        answer = await call(wire, name)
        assert answer.status in ((400,) if " " in name else (403,))
        if answer.status == 403:
            assert (problem(answer)["code"], problem(answer)["missing"]) == ("tool_not_allowed", "tool")
    assert not wire.upstream.requests


async def test_challenge_names_all_scopes_of_route_and_tool(start: Start) -> None:
    wire = await calling(
        start, "read", scopes=frozenset({"mcp:use"}), row={"scopes": ["mcp:use"]}, mcp_scopes=["mcp:use"]
    )
    for answer in (await ask(wire), await call(wire, "read")):
        assert 'error="insufficient_scope", scope="data:read mcp:use"' in str(answer.one("WWW-Authenticate"))


async def test_refusal_for_a_scope_of_the_route_names_those_of_the_tool_too(start: Start) -> None:
    wire = await calling(start, "read", scopes=frozenset(), row={"scopes": ["mcp:use"]})
    answer = await ask(wire)
    assert (answer.status, problem(answer)["code"]) == (403, "insufficient_scope")
    assert 'scope="data:read mcp:use"' in str(answer.one("WWW-Authenticate"))


@pytest.mark.parametrize("method", ["initialize", "ping", "tools/list", "resources/read", "notifications/initialized"])
async def test_messages_that_call_no_tool_need_only_the_scopes_of_the_route(start: Start, method: str) -> None:
    wire = await calling(start, scopes=frozenset({"mcp:use"}), mcp_scopes=["mcp:use"])
    assert (await ask(wire, "POST", MCP_PATH, JSON, body=message(method, uri="file:///a"))).status == 200
    wire.identities.add(fakes.key(1), fakes.identity(scopes=frozenset()))
    answer = await ask(wire, "POST", MCP_PATH, JSON, body=message(method))
    assert (answer.status, problem(answer)["code"]) == (403, "insufficient_scope")
    assert len(wire.upstream.requests) == 1


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "HEAD", "QUERY"])
async def test_other_methods_on_an_mcp_route_are_refused_whatever_their_body(start: Start, method: str) -> None:
    wire = await calling(start)
    body = b"" if method == "HEAD" else message(name="transfer")
    assert (await ask(wire, method, MCP_PATH, JSON, body=body)).status == 403
    assert wire.recorder.seen[-1].reason is Reason.ROUTE_NOT_ALLOWED
    assert not wire.upstream.requests


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_get_and_delete_of_mcp_carry_no_message(start: Start, method: str) -> None:
    wire = await calling(start)
    assert (await ask(wire, method, MCP_PATH, "Accept: text/event-stream", body=b"")).status == 200
    sent = len(wire.upstream.requests)
    answer = await ask(wire, method, MCP_PATH, JSON, "X-HTTP-Method-Override: POST", body=message(name="transfer"))
    assert (answer.status, len(wire.upstream.requests)) == (400, sent)


HANDSHAKE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eHh4")


@pytest.mark.parametrize(
    ("target", "tool", "status"),
    [(MCP_PATH, "", 400), (PATH, "transfer", 400), (PATH, "mail", 400), (PATH, "read", 200)],
)
async def test_websocket_handshake_is_refused_where_calls_are_read(
    start: Start, target: str, tool: str, status: int
) -> None:
    wire = await calling(start, tool)
    wire.approvals.consents.add(("u_42", "mail"))
    answer = await ask(wire, "GET", target, *HANDSHAKE, body=b"")
    assert answer.status == status
    assert len(wire.upstream.requests) == (status == 200)


@pytest.mark.parametrize("tool", ["transfer", "mail"])
@pytest.mark.parametrize(("count", "status"), [(2048, 0), (2049, 413)])
async def test_body_of_a_call_that_needs_an_approval_is_at_most_body_bytes_max(
    start: Start, tool: str, count: int, status: int
) -> None:
    wire = await calling(start, tool, mcp=McpSettings(body_bytes_max=2048))
    wire.approvals.consents.add(("u_42", "mail"))
    assert ((await ask(wire, body=b"x" * count)).status == 413) is (status == 413)
    async with wire.client() as client:
        await client.send(request("POST", PATH, JSON, "Transfer-Encoding: chunked"))
        await client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (count, b"x" * count))
        assert ((await client.answer()).status == 413) is (status == 413)


async def test_body_of_a_call_without_an_approval_is_not_bounded_or_awaited(start: Start) -> None:
    wire = await calling(start, "read", mcp=McpSettings(body_bytes_max=2048))
    async with wire.client() as client:
        await client.send(request("POST", PATH, JSON, "Content-Length: 4096") + b"x" * 100)
        await until(lambda: bool(wire.upstream.heads), "the head is forwarded before the body has arrived")
        await client.send(b"x" * 3996)
        assert (await client.answer()).status == 200


async def test_consent_replaces_the_approval_of_a_consent_tool_only(start: Start) -> None:
    wire = await calling(start, "mail")
    wire.approvals.consents |= {("u_42", "mail"), ("u_42", "transfer")}
    wire.approvals.slow.add(("u_42", "mail"))
    assert (await ask(wire)).status == 200
    assert (await call(wire, "mail")).status == 200
    assert (await call(wire, "transfer")).status != 200
    assert [one.one("X-Keyproxy-Tool") for one in wire.upstream.requests] == ["mail", "mail"]


async def test_consents_that_cannot_be_queried_refuse_the_call_with_503(start: Start) -> None:
    wire = await calling(start, "mail")
    wire.approvals.slow.add(("u_42", "mail"))
    wire.approvals.is_down = True
    answer = await ask(wire)
    assert (answer.status, problem(answer)["code"], answer.one("Retry-After")) == (503, "approvals_unavailable", "2")
    assert not wire.upstream.requests


async def test_call_in_flight_ends_once_its_credential_may_not_call_the_tool(start: Start) -> None:
    begun = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n: \n\r\n"
    wire = await calling(start, "read", serving=Upstream(answer_with(begun)))
    async with wire.client() as client:
        await client.send(request("GET", PATH))
        answer = await read_head(client.reader)
        assert answer is not None
        assert answer.status == 200
        wire.identities.add(fakes.key(1), fakes.identity(scopes=frozenset()))
        await until(lambda: bool(wire.recorder.seen), "the stream ends")
    assert (wire.recorder.seen[0].reason, wire.recorder.seen[0].ending) == (Reason.TOOL_NOT_ALLOWED, Ending.CUT)


async def test_certificate_on_another_connection_does_not_count(start: Start, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    authority.issue_cert("worker", common_name="worker").private_key_and_cert_chain_pem.write_to_path(
        str(tmp_path / "worker.pem")
    )
    context = tls.server_context(
        str(tmp_path / "server.pem"), "", str(tmp_path / "ca.pem"), requires_client_certificates=False
    )
    wire = await calling(start, "call_partner", tls=context)
    assert not isinstance(wire.address, str)

    async def status(certificate: str) -> bytes:
        client = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        if certificate:
            client.load_cert_chain(str(tmp_path / certificate))
        reader, writer = await asyncio.open_connection(*wire.address, ssl=client)
        try:
            writer.write(request("POST", PATH, JSON, "X-Keyproxy-Client-Cert-Subject: CN=worker", body=b"{}"))
            return (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5))[9:12]
        finally:
            writer.close()

    assert [await status(one) for one in ("", "worker.pem", "")] == [b"403", b"200", b"403"]
    foreign = trustme.CA().issue_cert("worker", common_name="worker")
    foreign.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "foreign.pem"))
    with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
        await status("foreign.pem")


async def test_approval_is_not_used_by_another_tenant_to_which_the_key_moves_meanwhile(start: Start) -> None:
    wire = await calling(start, "transfer")
    assert (await ask(wire)).status == 403
    wire.approvals.approve()
    claim = wire.approvals.claim

    async def claim_and_move(request: ApprovalRequest, patience: TimeBudget) -> ToolClaim:
        found = await claim(request, patience)
        wire.identities.add(fakes.key(1), fakes.identity(tenant="umbrella", scopes=ALL_SCOPES))
        return found

    wire.approvals.claim = claim_and_move  # type: ignore[method-assign]
    assert (await ask(wire)).status == 401
    assert not wire.upstream.requests
    await until(lambda: not wire.approvals.claims, "the approval is given back")
    assert len(wire.approvals.approved) == 1
