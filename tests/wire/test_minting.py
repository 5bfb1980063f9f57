"""Routes that serve agent tokens, on the wire: who is refused and with what, the response, and what is charged."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest

from keyproxy.config.schema import RouteRow
from keyproxy.limits.plan import Plan
from keyproxy.model import AgentToken, Ending, Identity
from keyproxy.reasons import Reason
from tests import fakes
from tests.rawhttp import Message
from tests.waiting import until
from tests.wire.conftest import KEY, Start, Wire, request

PATH = "/v1/agent-tokens"
ASKED = b'{"agent":"crawler","role":"reader"}'
SCOPES = frozenset({"agents:mint", "data:read"})


def minting(body: bytes = ASKED, *lines: str, method: str = "POST") -> bytes:
    return request(method, PATH, *lines, body=body)


async def begin(
    start: Start, plan: Plan | None = None, who: Identity | None = None, *, shape: str = "problem", **more: Any
) -> Wire:
    rows = [
        RouteRow(f"POST {PATH}", ["agents:mint"], shape, serves="agent-tokens"), RouteRow("* /{rest...}", name="any"),
    ]  # fmt: skip
    wire = await start(rows=rows, **more)
    who = who or fakes.identity(plan=plan, scopes=SCOPES)
    wire.identities.add(fakes.key(1), who)
    wire.mint.parents[who.key_id if who.agent_token is None else who.agent_token.token_id] = who
    return wire


async def answer(wire: Wire, *parts: bytes) -> Message:
    async with wire.client() as client:
        for part in parts:
            await client.send(part)
        return (await client.answers())[-1]


async def code(wire: Wire, *parts: bytes) -> str:
    response = await answer(wire, *parts)
    content = json.loads(response.body)
    return str(content.get("code", response.status))


def problem(response: Message) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(response.body)
    return content


def settled(wire: Wire) -> list[bool]:
    return [was_sent for _, was_sent, _ in wire.ledger.settled]


async def test_minted_token_is_the_response_and_nothing_goes_upstream(start: Start) -> None:
    wire = await begin(start)
    async with wire.client() as client:
        await client.send(minting())
        created = await client.answer()
        await client.send(request("GET", "/other"))
        assert (await client.answer()).status == 200
    assert created.start == "HTTP/1.1 201 Created"
    assert created.one("Cache-Control") == "no-store"
    assert created.one("Content-Type") == "application/json"
    assert created.one("X-Request-Id")
    assert created.one("Date")
    assert created.one("Connection") is None
    content = problem(created)
    assert content["token"] == wire.mint.minted[0].token.reveal().decode()
    assert (content["agent"], content["user"], content["tenant"], content["scopes"]) == (
        "crawler", "u_42", "acme", ["data:read"],
    )  # fmt: skip
    assert [message.start for message in wire.upstream.requests] == ["GET /other HTTP/1.1"]
    record = wire.recorder.seen[0]
    assert (record.status, record.ending, record.reason) == (201, Ending.COMPLETED, None)


async def test_token_is_cut_from_the_presented_credential(start: Start) -> None:
    wire = await begin(start)
    assert (await answer(wire, minting())).status == 201
    who = dataclasses.replace(fakes.identity(scopes=SCOPES), actor_user_id="u_worker")
    wire.identities.add(fakes.key(1), who)
    assert (await answer(wire, minting())).status == 201
    token = dataclasses.replace(who, agent_token=AgentToken("agt_1", ("crawler",), 0))
    wire.identities.add(fakes.key(1), token)
    wire.mint.parents["agt_1"] = token
    assert (await answer(wire, minting())).status == 201
    assert [(one.key_id, one.token_id, one.user_id, actor) for one, _, actor in wire.mint.calls] == [
        ("key_of_u_42", None, None, "key:key_of_u_42"),
        ("key_of_u_42", None, "u_42", "key:key_of_u_42"),
        ("key_of_u_42", "agt_1", None, "agent_token:agt_1"),
    ]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
async def test_other_methods_do_not_mint(start: Start, method: str) -> None:
    wire = await begin(start)
    async with wire.client() as client:
        await client.send(minting(b"", method=method))
        assert (await client.answer(method=method)).status == 200
    assert not wire.mint.calls
    assert len(wire.upstream.requests) == 1


async def test_credential_without_the_scope_does_not_mint(start: Start) -> None:
    wire = await begin(start, who=fakes.identity(scopes=frozenset({"data:read"})))
    assert await code(wire, minting()) == "insufficient_scope"
    assert not wire.mint.calls


@pytest.mark.parametrize("shape", ["problem", "openai", "anthropic", "gemini", "ollama", "bedrock"])
async def test_refusal_names_the_member_in_the_format_of_the_route(start: Start, shape: str) -> None:
    wire = await begin(start, shape=shape)
    response = await answer(wire, minting(b'{"agent":"crawler","role":"reader","ttl_seconds":901}'))
    assert response.status == 400
    assert b"ttl_seconds" in response.body
    assert response.one("Cache-Control") == "no-store"
    if shape == "openai":
        assert problem(response)["error"]["param"] == "ttl_seconds"
    refused = await answer(wire, minting(b'{"agent":"crawler","scopes":["data:write"]}'))
    assert refused.status == 403
    assert b"scopes" in refused.body


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (b'{"agent":"crawler","role":"reader","token_budget":-1}', "request_malformed"),
        (b'{"agent":"crawler","role":"reader","audience":"upstream"}', "request_malformed"),
        (b'{"agent":"crawler","scopes":["data:write"]}', "delegation_refused"),
        (b'{"agent":"crawler","role":"reader"}', "store_unavailable"),
    ],
)
async def test_form_and_known_authority_are_refused_even_while_the_store_is_down(
    start: Start, asked: bytes, expected: str
) -> None:
    wire = await begin(start)
    wire.mint.is_down = True
    assert await code(wire, minting(asked)) == expected
    assert len(wire.mint.calls) == (expected == "store_unavailable")


async def test_refusal_of_the_store_is_the_response(start: Start) -> None:
    wire = await begin(start)
    response = await answer(wire, minting(b'{"agent":"crawler","role":"unknown"}'))
    assert (response.status, problem(response)["code"]) == (403, "delegation_refused")


async def test_too_many_live_tokens_exhaust_a_quota_that_names_its_reset(start: Start) -> None:
    wire = await begin(start)
    wire.mint.rules = dataclasses.replace(wire.mint.rules, tokens_max=1)
    assert (await answer(wire, minting())).status == 201
    response = await answer(wire, minting())
    content = problem(response)
    assert (response.status, content["code"], content["policy"]) == (429, "quota_exhausted", "key.agent_tokens")
    assert (content["limit"], content["remaining"], content["reset_seconds"], content["retryable"]) == (1, 0, 61, True)
    assert response.one("Retry-After") == "61"
    assert response.one("x-should-retry") == "false"
    assert response.one("RateLimit-Policy") == '"key.agent_tokens";q=1;qu="agent-tokens"'
    assert wire.recorder.seen[-1].policy == "key.agent_tokens"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((), "201"),
        (("Content-Type: application/json",), "201"),
        (("Content-Type: application/x-www-form-urlencoded",), "201"),
        (("Content-Type: application/json; charset=latin-1",), "request_malformed"),
        (("Content-Encoding: gzip",), "request_malformed"),
    ],
)
async def test_body_is_judged_by_its_content(start: Start, lines: tuple[str, ...], expected: str) -> None:
    wire = await begin(start)
    assert await code(wire, minting(ASKED, *lines)) == expected


@pytest.mark.parametrize("arrives", ["at once", "later", "chunked", "chunked later"])
@pytest.mark.parametrize(("size", "expected"), [(16_384, "201"), (16_385, "body_too_large")])
async def test_body_has_at_most_16_kib(start: Start, arrives: str, size: int, expected: str) -> None:
    wire = await begin(start, tokens={"body_bytes_max": 1_024})
    content = ASKED + b" " * (size - len(ASKED))
    head, _, _ = minting(content).partition(b"\r\n\r\n")
    if arrives.startswith("chunked"):
        head = request("POST", PATH, "Transfer-Encoding: chunked").removesuffix(b"\r\n\r\n")
        content = b"%x\r\n%b\r\n0\r\n\r\n" % (size, content)
    whole = head + b"\r\n\r\n" + content
    parts = [whole] if arrives in ("at once", "chunked") else [whole[:-16_000], whole[-16_000:]]
    async with wire.client() as client:
        await client.send(parts[0])
        if len(parts) > 1:
            await asyncio.sleep(0.05)
            await client.send(parts[1])
        response = await client.answer()
    assert str(problem(response).get("code", response.status)) == expected
    assert len(wire.mint.calls) == (expected == "201")


async def test_client_that_expects_100_is_asked_for_a_body_that_can_be_read(start: Start) -> None:
    wire = await begin(start)
    async with wire.client() as client:
        await client.send(minting(ASKED, "Expect: 100-continue").removesuffix(ASKED))
        assert (await client.answer()).status == 100
        await client.send(ASKED)
        assert (await client.answer()).status == 201
    async with wire.client() as client:
        await client.send(request("POST", PATH, "Expect: 100-continue", "Content-Length: 16385"))
        response = await client.answer()
        assert (response.status, response.one("Connection")) == (413, "close")


async def test_empty_body_is_refused_without_waiting(start: Start) -> None:
    wire = await begin(start)
    assert await code(wire, minting(b"")) == "request_malformed"
    assert await code(wire, request("POST", PATH, "Content-Length: 0")) == "request_malformed"


@pytest.mark.parametrize(("line", "kept"), [("Connection: keep-alive", True), ("Accept: */*", False)])
async def test_http_1_0_client_keeps_its_connection_if_it_asks_to(start: Start, line: str, kept: bool) -> None:
    wire = await begin(start)
    async with wire.client() as client:
        await client.send(minting(ASKED, line).replace(b"HTTP/1.1", b"HTTP/1.0"))
        response = await client.answer()
        assert response.status == 201
        assert response.one("Connection") == ("keep-alive" if kept else "close")
        if kept:
            await client.send(minting())
            assert (await client.answer()).status == 201
        else:
            assert await client.ends() == b""


async def test_pipelined_requests_mint_in_order(start: Start) -> None:
    wire = await begin(start)
    async with wire.client() as client:
        await client.send(minting() + minting(b'{"agent":"second","role":"reader"}') + request("GET", "/after"))
        assert [problem(await client.answer())["agent"] for _ in range(2)] == ["crawler", "second"]
        assert (await client.answer()).status == 200


# -- what is charged


async def test_201_costs_one_request_and_a_refusal_none(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5))
    response = await answer(wire, minting())
    assert response.one("RateLimit-Policy") == '"user.requests_per_day";q=5;w=86400'
    assert (response.one("RateLimit") or "").startswith('"user.requests_per_day";r=4;t=')
    for asked in (b"{}", b'{"agent":"a","scopes":["data:write"]}', b'{"agent":"a","role":"unknown"}'):
        await answer(wire, minting(asked))
    wire.mint.is_down = True
    await answer(wire, minting())
    wire.mint.is_down = False
    response = await answer(wire, minting())
    assert (response.one("RateLimit") or "").startswith('"user.requests_per_day";r=3;t=')
    # What is refused before anything is taken has nothing to settle.
    assert settled(wire) == [True, False, False, True]


async def test_spent_quota_refuses_before_the_store_is_asked(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=1))
    assert (await answer(wire, minting())).status == 201
    response = await answer(wire, minting())
    assert (response.status, problem(response)["policy"]) == (429, "user.requests_per_day")
    assert len(wire.mint.calls) == 1


async def test_rate_is_not_returned_after_a_refusal_of_the_store(start: Start) -> None:
    wire = await begin(start, Plan(rate=0.001, burst=2))
    for _ in range(2):
        assert await code(wire, minting(b'{"agent":"a","role":"unknown"}')) == "delegation_refused"
    assert await code(wire, minting()) == "rate_limited"


async def test_mint_counts_as_concurrent_until_its_response(start: Start) -> None:
    wire = await begin(start, Plan(concurrency=1))
    wire.mint.may_mint.clear()
    async with wire.client() as client:
        await client.send(minting())
        await until(lambda: len(wire.mint.calls) == 1)
        assert await code(wire, minting()) == "concurrency_limited"
        wire.mint.may_mint.set()
        assert (await client.answer()).status == 201
    assert (await answer(wire, minting())).status == 201


async def test_body_that_arrives_counts_as_concurrent(start: Start) -> None:
    wire = await begin(start, Plan(concurrency=1))
    async with wire.client() as client:
        await client.send(minting().removesuffix(ASKED))
        await until(lambda: wire.server.open_requests() == 1)
        await asyncio.sleep(0.05)
        assert await code(wire, minting()) == "concurrency_limited"
        await client.send(ASKED)
        assert (await client.answer()).status == 201
    assert (await answer(wire, minting())).status == 201


async def test_idempotency_key_has_no_effect(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5))
    for left in (4, 3):
        response = await answer(wire, minting(ASKED, "Idempotency-Key: one"))
        assert response.status == 201
        assert (response.one("RateLimit") or "").startswith(f'"user.requests_per_day";r={left};t=')
    assert len({one.id for one in wire.mint.minted}) == 2


async def test_client_that_leaves_during_the_mint_is_charged_if_the_token_exists(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5))
    wire.mint.may_mint.clear()
    async with wire.client() as client:
        await client.send(minting())
        await until(lambda: len(wire.mint.calls) == 1)
    await until(lambda: wire.server.open_connections() == 0)
    assert settled(wire) == []
    assert not wire.recorder.seen
    assert wire.gateway.is_deciding
    wire.mint.may_mint.set()
    await wire.gateway.all_decided()
    assert settled(wire) == [True]
    (record,) = wire.recorder.seen
    assert (record.status, record.ending) == (499, Ending.CLIENT_GONE)


async def test_client_that_leaves_is_not_charged_if_no_token_exists(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5))
    wire.mint.may_mint.clear()
    wire.mint.is_down = True
    async with wire.client() as client:
        await client.send(minting())
        await until(lambda: len(wire.mint.calls) == 1)
    await until(lambda: wire.server.open_connections() == 0)
    wire.mint.may_mint.set()
    await wire.gateway.all_decided()
    assert settled(wire) == [False]
    assert [(one.status, one.ending) for one in wire.recorder.seen] == [(499, Ending.CLIENT_GONE)]


async def test_client_that_leaves_before_its_body_was_read_costs_nothing(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5, concurrency=1))
    async with wire.client() as client:
        await client.send(minting().removesuffix(ASKED))
        await until(lambda: wire.server.open_requests() == 1)
    await until(lambda: bool(wire.recorder.seen))
    assert settled(wire) == []
    assert not wire.mint.calls
    assert (await answer(wire, minting())).status == 201


async def test_client_that_leaves_while_the_ledger_is_asked_mints_nothing(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5))
    wire.ledger.may_reply.clear()
    async with wire.client() as client:
        await client.send(minting())
        await until(lambda: wire.gateway.is_deciding)
    await until(lambda: bool(wire.recorder.seen))
    wire.ledger.may_reply.set()
    await wire.gateway.all_decided()
    assert not wire.mint.calls
    assert settled(wire) == []


async def test_mint_is_begun_once_however_many_rounds_its_decision_takes(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5, concurrency=1))
    wire.identities.slow.add(fakes.key(1).digest())
    wire.ledger.may_reply.clear()
    async with wire.client() as client:
        await client.send(minting().removesuffix(ASKED))
        await until(lambda: wire.identities.brought == 1)
        await client.send(ASKED)
        await asyncio.sleep(0.05)
        wire.ledger.may_reply.set()
        assert (await client.answer()).status == 201
    assert len(wire.mint.calls) == 1
    assert settled(wire) == [True]


async def test_half_closed_client_gets_its_token(start: Start) -> None:
    wire = await begin(start)
    wire.mint.may_mint.clear()
    async with wire.client() as client:
        await client.send(minting())
        client.half_close()
        await until(lambda: len(wire.mint.calls) == 1)
        wire.mint.may_mint.set()
        response = await client.answer()
        assert (response.start, response.status) == ("HTTP/1.1 201 Created", 201)


async def test_draining_waits_for_the_token_and_closes_the_connection(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5))
    wire.mint.may_mint.clear()
    async with wire.client() as client:
        await client.send(minting())
        await until(lambda: len(wire.mint.calls) == 1)
        draining = asyncio.create_task(wire.server.drain(5.0))
        await until(lambda: wire.server.is_draining)
        wire.mint.may_mint.set()
        response = await client.answer()
        assert (response.status, response.one("Connection")) == (201, "close")
        await draining
    assert settled(wire) == [True]


async def test_drain_that_times_out_cuts_the_client_and_settles_by_what_the_store_did(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5))
    wire.mint.may_mint.clear()
    async with wire.client() as client:
        await client.send(minting())
        await until(lambda: len(wire.mint.calls) == 1)
        await wire.server.drain(0.05)
        assert await client.ends() == b""
    assert settled(wire) == []
    wire.mint.may_mint.set()
    await wire.gateway.all_decided()
    assert settled(wire) == [True]


async def test_defect_in_minting_is_an_internal_error_and_costs_nothing(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5))
    wire.mint.defect = RuntimeError("defect")
    assert await code(wire, minting()) == "internal_error"
    assert settled(wire) == [False]
    assert wire.recorder.seen[-1].reason is Reason.INTERNAL_ERROR


async def test_revocation_during_the_mint_is_for_the_store_to_judge(start: Start) -> None:
    wire = await begin(start, Plan(requests_per_day=5))
    wire.mint.may_mint.clear()
    async with wire.client() as client:
        await client.send(minting())
        await until(lambda: len(wire.mint.calls) == 1)
        wire.identities.add(fakes.key(1), fakes.identity(standing=Reason.KEY_REVOKED))
        await asyncio.sleep(1.2)
        wire.mint.parents.clear()
        wire.mint.may_mint.set()
        assert problem(await client.answer())["code"] == "delegation_refused"
    assert settled(wire) == [False]


async def test_retiring_key_is_announced_with_the_token(start: Start) -> None:
    retiring = dataclasses.replace(
        fakes.identity(scopes=SCOPES), retiring_field=b"X-Keyproxy-Key-Expires-In: ", expires_wall_seconds=4e9
    )
    wire = await begin(start, who=retiring)
    assert int((await answer(wire, minting())).one("X-Keyproxy-Key-Expires-In") or 0) > 0


async def test_key_is_never_in_a_response(start: Start) -> None:
    wire = await begin(start)
    for asked in (ASKED, KEY, b'{"%b":1}' % KEY, b'{"agent":"%b"}' % KEY):
        assert KEY not in (await answer(wire, minting(asked))).body
