"""On the wire: an approval is used when the call is sent, and given back when nothing of it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from keyproxy.ai.tools.tool import CONSENT, HUMAN
from keyproxy.ai.tools.tool_call import ToolClaim
from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import RouteRow
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.limits.plan import Plan
from keyproxy.model import TimeBudget
from keyproxy.ports.tools import ApprovalRequest
from tests import fakes
from tests.rawhttp import OK, Message, ResponseWriter, Upstream, answer_with
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request

TOOLS = [ToolRow("pay", approval=HUMAN), ToolRow("update", approval=CONSENT), ToolRow("search")]
ROUTES = [
    RouteRow("POST /pay", tool="pay"),
    RouteRow("GET /pay", tool="pay"),
    RouteRow("POST /update", tool="update"),
    RouteRow("* /mcp", protocol="mcp", error_shape="mcp"),
    RouteRow("* /{rest...}", name="any"),
]
JSON = "Content-Type: application/json"
PAY = request("POST", "/pay", JSON, body=b'{"amount":100}')


def called(arguments: str = '{"amount":100}', *, rpc_id: int = 7, tool: str = "pay") -> bytes:
    params = f'{{"name":"{tool}","arguments":{arguments}}}'
    body = f'{{"jsonrpc":"2.0","id":{rpc_id},"method":"tools/call","params":{params}}}'
    return request("POST", "/mcp", JSON, "Accept: application/json", body=body.encode())


async def begin(start: Start, plan: Plan | None = None, **more: Any) -> Wire:
    wire = await start(rows=ROUTES, tools=TOOLS, **more)
    wire.identities.add(fakes.key(1), fakes.identity(plan=plan))
    return wire


async def answers(wire: Wire, *raw: bytes) -> Sequence[Message]:
    async with wire.client() as client:
        got = []
        for one in raw:
            await client.send(one)
            got.append(await client.answer())
        return got


async def answer(wire: Wire, raw: bytes) -> Message:
    return (await answers(wire, raw))[0]


def code(response: Message) -> str:
    content = json.loads(response.body)
    return str(content.get("error", {}).get("data", content).get("code", response.status))


async def approved(wire: Wire, raw: bytes) -> None:
    assert (await answer(wire, raw)).status == 403
    wire.approvals.approve()


@pytest.mark.parametrize("raw", [PAY, called(), request("GET", "/pay")], ids=["http", "mcp", "without body"])
async def test_approved_call_is_sent_once_and_the_next_one_needs_a_new_approval(start: Start, raw: bytes) -> None:
    wire = await begin(start)
    first = await answer(wire, raw)
    assert (first.status, code(first)) == (403, "approval_required")
    assert first.one("Retry-After") == "5"
    assert not wire.upstream.requests
    wire.approvals.approve()
    assert [one.status for one in await answers(wire, raw, raw)] == [200, 403]
    assert len(wire.upstream.requests) == 1
    assert wire.upstream.requests[0].one("X-Keyproxy-Approval") == "apr_0000000000000000000001"
    assert len(wire.approvals.claims) == 1


async def test_g2_approval_counts_for_no_other_bytes_of_an_http_call(start: Start) -> None:
    wire = await begin(start)
    await approved(wire, PAY)
    others = [
        request("POST", "/pay", JSON, body=b'{"amount":900}'),
        request("POST", "/pay", JSON, body=b'{"amount":100} '),
        request("POST", "/pay", body=b'{"amount":100}'),
        request("POST", "/pay?", JSON, body=b'{"amount":100}'),
        request("POST", "/pay", JSON, "Content-Encoding: gzip", body=b'{"amount":100}'),
        request("GET", "/pay"),
    ]
    for other in others:
        assert code(await answer(wire, other)) == "approval_required", other
    assert not wire.upstream.requests
    assert (await answer(wire, PAY)).status == 200


async def test_g2_approval_counts_for_no_other_values_of_an_mcp_call(start: Start) -> None:
    wire = await begin(start)
    await approved(wire, called())
    for arguments in ('{"amount":900}', '{"amount":100.0}', '{"amount":100,"to":"x"}', '{"Amount":100}', "{}"):
        assert code(await answer(wire, called(arguments))) == "approval_required", arguments
    assert not wire.upstream.requests
    # Another id, other spelling: the same call.
    assert (await answer(wire, called('{ "amount" : 100 }', rpc_id=8))).status == 200


@pytest.mark.parametrize("arguments", ['{"a":1,"a":2}', '{"a":{"b":[{"c":1,"\\u0063":2}]}}', '{"a":"\\ud800"}'])
async def test_mcp_call_with_repeated_names_or_lone_surrogates_is_malformed_and_needs_no_approval(
    start: Start, arguments: str
) -> None:
    wire = await begin(start)
    refused = await answer(wire, called(arguments))
    assert (refused.status, code(refused)) == (400, "request_malformed")
    assert not wire.approvals.pending


@pytest.mark.parametrize("raw", [PAY, called()], ids=["http", "mcp"])
async def test_g3_unreachable_upstream_burns_no_approval(start: Start, raw: bytes) -> None:
    wire = await begin(start)
    await approved(wire, raw)
    await wire.upstream.stop()
    for _ in range(3):
        assert code(await answer(wire, raw)) == "upstream_unreachable"
        assert len(wire.approvals.approved) == 1
    async with Upstream(port=wire.upstream.port).serving() as again:
        assert (await answer(wire, raw)).status == 200
        assert len(again.requests) == 1
    assert code(await answer(wire, raw)) == "approval_required"


@pytest.mark.parametrize("raw", [PAY, called()], ids=["http", "mcp"])
async def test_g3_limit_that_refuses_burns_no_approval_and_requests_none(start: Start, raw: bytes) -> None:
    wire = await begin(start, Plan(requests_per_day=1))
    await approved(wire, raw)
    assert (await answer(wire, request("POST", "/other"))).status == 200
    assert code(await answer(wire, raw)) == "quota_exhausted"
    assert len(wire.approvals.approved) == 1
    assert code(await answer(wire, called('{"amount":7}'))) == "quota_exhausted"
    assert not wire.approvals.pending
    assert len(wire.upstream.requests) == 1


async def test_g3_limit_that_refuses_after_the_claim_gives_the_approval_back(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=1))
    await approved(wire, PAY)
    claim = wire.approvals.claim

    async def slowly(asked: ApprovalRequest, patience: TimeBudget) -> ToolClaim:
        made = await claim(asked, patience)
        assert (await answer(wire, request("POST", "/other"))).status == 200
        return made

    wire.approvals.claim = slowly  # type: ignore[assignment,method-assign]
    assert code(await answer(wire, PAY)) == "quota_exhausted"
    assert len(wire.approvals.approved) == 1
    assert not wire.approvals.claims


async def test_g3_key_revoked_after_the_claim_gives_the_approval_back(start: Start) -> None:
    wire = await begin(start)
    await approved(wire, PAY)
    claim = wire.approvals.claim

    async def slowly(asked: ApprovalRequest, patience: TimeBudget) -> ToolClaim:
        made = await claim(asked, patience)
        del wire.identities.table[fakes.key(1).digest()]
        return made

    wire.approvals.claim = slowly  # type: ignore[assignment,method-assign]
    assert (await answer(wire, PAY)).status == 401
    assert len(wire.approvals.approved) == 1


async def test_g3_client_that_leaves_during_the_claim_burns_no_approval(start: Start) -> None:
    wire = await begin(start)
    await approved(wire, PAY)
    claim, may_go_on, is_claiming = wire.approvals.claim, asyncio.Event(), asyncio.Event()

    async def slowly(asked: ApprovalRequest, patience: TimeBudget) -> ToolClaim:
        is_claiming.set()
        await may_go_on.wait()
        return await claim(asked, patience)

    wire.approvals.claim = slowly  # type: ignore[assignment,method-assign]
    before = len(wire.recorder.seen)
    async with wire.client() as client:
        await client.send(PAY)
        await is_claiming.wait()
    await until(lambda: len(wire.recorder.seen) > before)
    may_go_on.set()
    await until(lambda: not wire.gateway.is_deciding)
    assert len(wire.approvals.approved) == 1
    assert not wire.approvals.claims
    assert not wire.upstream.requests


@pytest.mark.parametrize("raw", [PAY, request("GET", "/pay")], ids=["POST", "GET"])
async def test_call_that_was_sent_has_used_its_approval_and_is_not_sent_again(start: Start, raw: bytes) -> None:
    wire = await begin(start, serving=Upstream(answering=answer_with(b"", goes_on=False)))
    await approved(wire, raw)
    lost = await answer(wire, raw)
    assert (lost.status, code(lost)) == (502, "upstream_unreachable")
    assert len(wire.upstream.requests) == 1
    assert not wire.approvals.approved
    assert code(await answer(wire, raw)) == "approval_required"


@pytest.mark.parametrize("raw", [PAY, called(), request("GET", "/pay")], ids=["http", "mcp", "without body"])
async def test_g3_connection_that_the_upstream_closes_while_idle_burns_no_approval(start: Start, raw: bytes) -> None:
    wire = await begin(start, serving=Upstream(answering=close_the_second_request()))
    await approved(wire, raw)
    # The connection that this leaves open takes no second request.
    assert (await answer(wire, request("GET", "/other"))).status == 200
    assert (await answer(wire, raw)).status == 200
    assert wire.upstream.connections == 2
    assert len(wire.upstream.requests) == 2


def close_the_second_request() -> ResponseWriter:
    """Serve one request per connection, and close it without a response when the next one has arrived."""
    served: set[asyncio.StreamWriter] = set()

    async def respond(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if writer in served:
            return False
        served.add(writer)
        writer.write(OK)
        return True

    return respond


async def test_idempotency_key_of_a_call_that_was_sent_brings_no_second_execution(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=1))
    raw = request("POST", "/pay", JSON, "Idempotency-Key: once", body=b'{"amount":100}')
    await approved(wire, raw)
    assert (await answer(wire, raw)).status == 200
    await until(lambda: not wire.claims.pending)
    # It is charged already, so the spent quota does not refuse it; its approval is used.
    assert code(await answer(wire, raw)) == "approval_required"
    wire.approvals.approve()
    assert (await answer(wire, raw)).status == 200
    assert len(wire.upstream.requests) == 2


async def test_consent_covers_every_call_and_is_no_claim(start: Start) -> None:
    wire = await begin(start)
    raw = request("POST", "/update", JSON, body=b"{}")
    assert code(await answer(wire, raw)) == "approval_required"
    wire.approvals.consents.add(("u_42", "update"))
    assert [one.status for one in await answers(wire, raw, raw)] == [200, 200]
    assert wire.upstream.requests[0].one("X-Keyproxy-Approval") is None
    wire.approvals.consents.clear()
    wire.approvals.approve()
    assert [one.status for one in await answers(wire, raw, raw)] == [200, 403]


async def test_store_without_response_refuses_the_call_and_nothing_is_sent_or_charged(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=1))
    await approved(wire, PAY)
    wire.approvals.is_down = True
    down = await answer(wire, PAY)
    assert (down.status, code(down), down.one("Retry-After")) == (503, "approvals_unavailable", "2")
    wire.approvals.is_down = False
    assert (await answer(wire, PAY)).status == 200
    assert [was_sent for _, was_sent, _ in wire.ledger.settled] == [True]


async def test_call_counts_as_concurrent_while_its_approval_is_claimed(start: Start) -> None:
    wire = await begin(start, Plan(concurrency=1))
    await approved(wire, PAY)
    claim, may_go_on, is_claiming = wire.approvals.claim, asyncio.Event(), asyncio.Event()

    async def slowly(asked: ApprovalRequest, patience: TimeBudget) -> ToolClaim:
        is_claiming.set()
        await may_go_on.wait()
        return await claim(asked, patience)

    wire.approvals.claim = slowly  # type: ignore[assignment,method-assign]
    async with wire.client() as client:
        await client.send(PAY)
        await is_claiming.wait()
        assert code(await answer(wire, request("POST", "/other"))) == "concurrency_limited"
        may_go_on.set()
        assert (await client.answer()).status == 200
    assert (await answer(wire, request("POST", "/other"))).status == 200


async def test_approver_sees_the_arguments_without_the_key_of_the_caller(start: Start) -> None:
    wire = await begin(start)
    foreign = b"a-foreign-key-of-48-characters-0123456789-abcdef"
    wire.identities.add(SecretKey(foreign), fakes.identity())
    body = b'{"amount":100,"note":"%b","password":"hunter2"}' % foreign
    await answer(wire, request("POST", "/pay", JSON, body=body, key=foreign))
    (asked,) = wire.approvals.pending.values()
    shown = json.loads(asked.summary)
    assert shown["arguments"] == {"amount": 100, "note": "[masked]", "password": "[masked]"}
    assert shown["digest"] == asked.digest.hex()
    assert shown["body_bytes"] == len(body)
    assert asked.client == shown["client"] == "127.0.0.1"
    assert foreign not in asked.summary
    assert b"hunter2" not in asked.summary


async def test_long_arguments_are_digested_while_other_requests_are_served(start: Start) -> None:
    wire = await begin(start)
    long = called('{"a":[' + ",".join(["[{}]"] * 40_000) + "]}")
    async with wire.client() as client:
        await client.send(long)
        await asyncio.sleep(0.05)
        quick = [await asyncio.wait_for(answer(wire, request("POST", "/other")), 10.0) for _ in range(20)]
        assert {one.status for one in quick} == {200}
        got = await client.answer()
        assert code(got) == "approval_required", (got.body, wire.recorder.seen[-1].detail)
