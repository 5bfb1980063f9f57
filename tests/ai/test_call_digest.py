"""An approval counts for one call of one caller: any other call, and the same call of another caller, differs."""

from __future__ import annotations

import dataclasses

from keyproxy.ai.tools.call_digest import canonical_params, http_digest, mcp_digest
from keyproxy.ai.tools.tool import ADMIN, CONSENT, HUMAN, Tool
from keyproxy.http.headers import FieldNames
from keyproxy.http_messages import RequestHead
from keyproxy.model import AgentToken, Identity
from keyproxy.wire.parsing.head_cache import RequestReader
from tests import fakes

PAY = Tool("pay", "pay", approval=HUMAN)
CALLER = dataclasses.replace(fakes.identity(), lineage="key_first")
ARGUMENTS = b'{"name":"pay","arguments":{"amount":100,"to":"acme"}}'


def head(*lines: str, target: str = "/pay?a=1", method: str = "POST") -> RequestHead:
    raw = "\r\n".join([f"{method} {target} HTTP/1.1", "Host: proxy.test", *lines, "", ""]).encode("latin-1")
    return RequestReader(FieldNames(), fakes.holds_key).read(raw, len(raw) - 4)


def of_http(
    *lines: str, who: Identity = CALLER, tool: Tool = PAY, body: bytes = b"{}", target: str = "/pay?a=1",
    method: str = "POST", route: str = "POST /pay",
) -> bytes:  # fmt: skip
    return http_digest(who, route, tool, head=head(*lines, target=target, method=method), body=body)


def of_mcp(
    *lines: str, who: Identity = CALLER, tool: Tool = PAY, params: bytes = ARGUMENTS, route: str = "* /mcp"
) -> bytes:
    canonical = canonical_params(params).whole()
    return mcp_digest(who, route, tool, head=head(*lines, target="/mcp"), params=canonical)


def callers() -> list[Identity]:
    """Callers that differ in one property each."""
    token = AgentToken("agt_1", ("cleaner",), 1)
    return [
        CALLER,
        dataclasses.replace(CALLER, tenant_id="other"),
        dataclasses.replace(CALLER, user_id="u_43"),
        dataclasses.replace(CALLER, lineage="key_second"),
        dataclasses.replace(CALLER, is_test=True),
        dataclasses.replace(CALLER, agent_token=token),
        dataclasses.replace(CALLER, agent_token=dataclasses.replace(token, agents=("writer",))),
        # Named by another agent that has minted its token.
        dataclasses.replace(CALLER, agent_token=dataclasses.replace(token, agents=("cleaner", "writer"))),
        dataclasses.replace(CALLER, agent_token=dataclasses.replace(token, agents=("writer", "cleaner"))),
        # Names that run together without their lengths.
        dataclasses.replace(CALLER, tenant_id="acmeu_4", user_id="2"),
    ]


def tools() -> list[Tool]:
    return [Tool("pay", "pay", approval=kind) for kind in (CONSENT, ADMIN)] + [Tool("pay2", "pay", approval=HUMAN)]


def test_digest_of_a_call_differs_for_each_caller_tool_and_route() -> None:
    for of in (of_http, of_mcp):
        digests = [of(who=who) for who in callers()]
        digests += [of(tool=tool) for tool in tools()]
        digests.append(of(route="another"))
        assert len(set(digests)) == len(digests)
        assert {len(digest) for digest in digests} == {32}


def test_rotated_key_and_renewed_token_find_the_approval_of_the_call() -> None:
    token = AgentToken("agt_1", ("cleaner",), 1)
    for of in (of_http, of_mcp):
        assert of(who=dataclasses.replace(CALLER, key_id="key_second")) == of()
        agents = [dataclasses.replace(CALLER, agent_token=dataclasses.replace(token, token_id=i)) for i in ("a", "b")]
        assert of(who=agents[0]) == of(who=agents[1])
        narrower = dataclasses.replace(CALLER, agent_token=dataclasses.replace(token, agents=("cleaner", "cleaner")))
        assert of(who=narrower) == of(who=agents[0])
        unlisted = dataclasses.replace(CALLER, lineage="", key_id="key_first")
        assert of(who=unlisted) == of()


def test_digest_of_an_http_call_covers_every_byte_that_the_upstream_acts_on() -> None:
    digests = [of_http(body=body) for body in (b"{}", b"{} ", b"", b"\0")]
    digests += [of_http(target=target) for target in ("/pay", "/pay?", "/pay?a=2", "/pay?a=1&a=2", "/pay/?a=1")]
    digests += [of_http(method=method) for method in ("PUT", "PATCH")]
    digests += [of_http(f"Content-Type: {one}") for one in ("application/json", "text/plain", "Application/JSON")]
    digests += [of_http(f"Content-Encoding: {one}") for one in ("gzip", "br")]
    digests += [of_http("Content-Encoding: gzip", "Content-Encoding: br")]
    digests += [of_http("Content-Encoding: br", "Content-Encoding: gzip")]
    digests += [of_http("Content-Type: gzip", "Content-Encoding: application/json")]
    assert len(set(digests)) == len(digests)


def test_digest_of_an_http_call_ignores_request_ids_and_other_headers() -> None:
    assert of_http("X-Request-Id: 1", "traceparent: 00-1", "Idempotency-Key: a") == of_http("X-Trace: 2", "Date: now")
    assert of_http("content-type:  text/plain ") == of_http("Content-Type: text/plain")


def test_digest_of_an_mcp_call_covers_every_value_of_its_parameters() -> None:
    digests = [
        of_mcp(params=params)
        for params in (
            ARGUMENTS,
            ARGUMENTS.replace(b"100", b"100.0"),
            ARGUMENTS.replace(b"100", b"1e2"),
            ARGUMENTS.replace(b"100", b'"100"'),
            ARGUMENTS.replace(b"acme", b"acme "),
            ARGUMENTS.replace(b'"to"', b'"To"'),
            ARGUMENTS.replace(b"}}", b'},"requestState":"x"}'),
            ARGUMENTS.replace(b"}}", b'},"inputResponses":{}}'),
            ARGUMENTS.replace(b"}}", b'},"_meta":{"account":1}}'),
            ARGUMENTS.replace(b"}}", b',"more":null}}'),
            b'{"name":"pay"}',
            b'{"name":"pay","arguments":{}}',
        )
    ]
    digests += [of_mcp(f"Mcp-Param-Amount: {value}") for value in ("1", "2")]
    digests += [
        of_mcp("Mcp-Param-Amount: 1", "Mcp-Param-Amount: 2"),
        of_mcp("Mcp-Param-Amount: 2", "Mcp-Param-Amount: 1"),
    ]
    digests += [of_mcp("Mcp_Param_Amount: 1"), of_mcp("Mcp.Param.Amount: 1"), of_mcp("Mcp-Param-To: 1")]
    assert len(set(digests)) == len(digests)


def test_restarted_agent_finds_the_approval_of_its_mcp_call() -> None:
    spelt = (
        b'{ "arguments" : {"to":"\\u0061cme" ,"amount":100}, '
        b'"_meta":{"progressToken":9,"traceparent":"00-2"}, "name":"pay"}'
    )
    lines = ("Mcp-Session-Id: 2", "Mcp-Name: pay", "X-Request-Id: 9", "MCP-Protocol-Version: 2025-06-18")
    assert of_mcp(*lines, params=spelt) == of_mcp()
    ordered = of_mcp("Mcp-Param-A: 1", "Mcp-Param-B: 2")
    assert ordered == of_mcp("mcp-param-b:2", "MCP-PARAM-A:  1")


def test_http_call_and_mcp_call_never_have_the_same_digest() -> None:
    assert of_http(body=b"", target="/mcp", route="* /mcp") != of_mcp(params=b"{}")
