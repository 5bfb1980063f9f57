"""Which credential may call which tool: every condition, in the order in which they are judged."""

from __future__ import annotations

import dataclasses

import pytest

from keyproxy.ai.tools.tool import Tool
from keyproxy.ai.tools.tool_rules import judge
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.model import AgentToken, Identity, Route
from keyproxy.reasons import Reason, Refusal
from tests import fakes

ROUTE = Route("route", frozenset({"mcp:use"}))
EVERYTHING = Tool("pay", "pay", frozenset({"data:write", "pay:now"}), frozenset({"agent"}), True, "human")
ALL_SCOPES = frozenset({"mcp:use", "data:write", "pay:now"})


def who(*scopes: str, is_agent: bool = False) -> Identity:
    found = fakes.identity(scopes=frozenset(scopes))
    return dataclasses.replace(found, agent_token=AgentToken("agt_1", ("bot",), 0)) if is_agent else found


def refusal(tool: Tool | None, identity: Identity, *, has_certificate: bool = False) -> Refusal:
    with pytest.raises(Refusal) as caught:
        judge(tool, identity, ROUTE, has_certificate=has_certificate)
    assert caught.value.reason is Reason.TOOL_NOT_ALLOWED
    return caught.value


@pytest.mark.parametrize(
    ("tool", "identity", "has_certificate", "missing"),
    [
        (None, who(*ALL_SCOPES, is_agent=True), True, "tool"),
        (EVERYTHING, who(), False, "credential"),
        (EVERYTHING, who(*ALL_SCOPES), True, "credential"),
        (EVERYTHING, who(is_agent=True), False, "client_certificate"),
        (EVERYTHING, who(*ALL_SCOPES, is_agent=True), False, "client_certificate"),
        (EVERYTHING, who("mcp:use", is_agent=True), True, "scope"),
        (EVERYTHING, who("mcp:use", "pay:now", is_agent=True), True, "scope"),
    ],
)
def test_first_condition_that_fails_is_named(
    tool: Tool | None, identity: Identity, has_certificate: bool, missing: str
) -> None:
    found = refusal(tool, identity, has_certificate=has_certificate)
    assert found.members == {"missing": missing}
    assert bool(found.missing_scopes) is (missing == "scope")


def test_credential_that_meets_every_condition_may_call_the_tool() -> None:
    judge(EVERYTHING, who(*ALL_SCOPES, is_agent=True), ROUTE, has_certificate=True)
    judge(Tool("search", "search"), who(), ROUTE, has_certificate=False)


@pytest.mark.parametrize(
    ("credentials", "keys", "agents"),
    [
        ((), True, True), (("key",), True, False), (("agent",), False, True), (("oauth", "agent"), False, True),
        (("key", "agent", "oauth"), True, True), (("key", "oauth"), True, False),
    ],
)  # fmt: skip
def test_tool_accepts_the_kinds_of_credentials_that_it_lists(
    credentials: tuple[str, ...], keys: bool, agents: bool
) -> None:
    tool = Tool("t", "t", credentials=frozenset(credentials))
    for identity, is_accepted in ((who(), keys), (who(is_agent=True), agents)):
        if is_accepted:
            judge(tool, identity, ROUTE, has_certificate=False)
        else:
            assert refusal(tool, identity).members == {"missing": "credential"}


def test_challenge_names_all_scopes_of_route_and_tool_and_the_sentence_those_that_are_missing() -> None:
    found = refusal(EVERYTHING, who("mcp:use", "pay:now", is_agent=True), has_certificate=True)
    assert found.missing_scopes == ["data:write", "mcp:use", "pay:now"]
    assert found.caller_text == "Missing scope: 'data:write'."
    found = refusal(EVERYTHING, who("mcp:use", is_agent=True), has_certificate=True)
    assert found.caller_text == "Missing scopes: 'data:write', 'pay:now'."


def test_tool_is_named_upstream_by_its_label_under_the_configured_prefix() -> None:
    tool = ToolRow("crm.update", "update_contact").tool("X-Acme-")
    assert tool.line == b"X-Acme-Tool: crm.update\r\n"
