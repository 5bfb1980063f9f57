"""The tool that one exchange calls: find it, judge the credential, claim the approval that the call needs.

    body read, where needed -> judged -> limits checked -> approval claimed -> limits taken -> forwarded

`ai.tools.tool_rules` decides; this module passes it what it needs of the exchange. On plain HTTP routes the route names
the tool, so that the credential is judged before the body is read; on MCP routes the body names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.tools import mcp_message, tool_rules
from keyproxy.ai.tools.tool import CONSENT, Tool
from keyproxy.ai.tools.tool_call import ToolCall
from keyproxy.ai.tools.tool_rules import ToolRules, ToolTable
from keyproxy.auth.api_key import KeyFormat
from keyproxy.decision import mcp_requests
from keyproxy.decision.approval_claims import ApprovalClaims
from keyproxy.decision.payments import Payments
from keyproxy.http_messages import RequestHead
from keyproxy.limits.allowance import Need
from keyproxy.model import Grant, Identity, Missing, Moment, Route
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.tools import Approvals
from keyproxy.reasons import Reason, Refusal

_POST: Final = b"POST"
#: The other methods of MCP over HTTP: GET opens a stream of messages, DELETE ends a session.
_MCP_WITHOUT_MESSAGE: Final = frozenset({b"GET", b"DELETE"})


class ToolCalls:
    """Judges the calls of one gateway. `rules`: of the routes that call tools."""

    def __init__(self, rules: Mapping[Route, ToolRules], approvals: Approvals, key_format: KeyFormat) -> None:
        #: The rules of the routes that call tools.
        self.rules: Final = dict(rules)
        self._approvals: Final = approvals
        self._claims: Final = ApprovalClaims(approvals, key_format)

    def decide(
        self, exchange: Exchange, head: RequestHead, grant: Grant, payments: Payments, *, rules: ToolRules, now: Moment
    ) -> None:
        """Find and judge the tool that a request calls, and read the body where that or an approval needs it.

        `rules`: of its route. Raises Missing until the body has arrived and is read, a Refusal if the credential may not
        call the tool.
        """
        if exchange.slots is not None:
            payments.release_slots(exchange)
        if rules.refuses_tunnels and head.fields.opens_tunnel:
            raise malformed("This route accepts no WebSocket handshakes.")
        if rules.mcp is not None:
            self._decide_mcp(exchange, head, grant, payments, rules=rules, now=now)
            return
        tool = rules.tool
        _judge(exchange, tool, grant, rules.table)
        if tool is not None and tool.has_approval:
            _read(exchange, head, grant, payments, rules=rules, now=now)

    def _decide_mcp(
        self, exchange: Exchange, head: RequestHead, grant: Grant, payments: Payments, *, rules: ToolRules, now: Moment
    ) -> None:
        method = head.line.method
        if method in _MCP_WITHOUT_MESSAGE:
            if head.has_body:
                # A server that takes the request for a POST, such as by an override, must not find a call in it.
                raise malformed("Only POST has a body on this route.")
            return
        if method != _POST:
            raise Refusal(Reason.ROUTE_NOT_ALLOWED, "a method that MCP does not use")
        reading = exchange.mcp
        if reading is None or reading.message is None:
            _read(exchange, head, grant, payments, rules=rules, now=now)
            reading = exchange.mcp
        message = None if reading is None else reading.message
        if message is not None and message.tool is not None:
            _judge(exchange, rules.table.by_mcp.get(message.tool), grant, rules.table)
        elif message is not None and grant.route.filters_tools_list and message.method == mcp_message.LIST:
            allowed = tool_rules.callable_tools(rules.table, grant.identity, has_certificate=_has_certificate(exchange))
            mcp_requests.filter_list(exchange, head, allowed)

    def require_claim(
        self,
        exchange: Exchange,
        head: RequestHead,
        grant: Grant,
        payments: Payments,
        *,
        need: Need,
        now: Moment,
        is_first_lookup: bool,
    ) -> None:
        """Raise Missing until the approval that a call needs is claimed.

        The limits are checked before, so that a request that they refuse neither uses nor requests an approval. They
        are taken after it; what was claimed and not sent is given back. The request counts as concurrent meanwhile.
        Raises a Refusal if a limit refuses the request, or consents cannot be queried now.
        """
        call, identity = exchange.tool_call, grant.identity
        if call is None or not call.tool.has_approval:
            return
        if call.claim is not None:
            _check_caller(call, identity)
            field, approval_id = self.rules[grant.route].approval_field, call.claim.approval_id.encode("ascii")
            call.lines = b"%b%b%b\r\n" % (call.tool.line, field, approval_id)
            return
        if not self._needs_approval(call, identity, now, is_first_lookup):
            return
        allowance = identity.allowance
        if allowance is not None:
            payments.check(exchange, allowance, need, now=now, asks=True)
        claiming = self._claims.claiming(exchange, head, grant, call)
        if allowance is not None:
            payments.take_slots(exchange, allowance, need, now)
        raise claiming

    def _needs_approval(self, call: ToolCall, identity: Identity, now: Moment, is_first_lookup: bool) -> bool:
        """Whether one call needs an approval of its own: a consent replaces it where one suffices."""
        tool = call.tool
        if tool.approval == CONSENT:
            call.has_consent = self._approvals.has_consent(identity, tool.name, now, is_first_lookup=is_first_lookup)
            return not call.has_consent
        return True

    def give_back(self, exchange: Exchange) -> None:
        """When an exchange has ended: give back an approval that it has claimed, unless a byte of it was sent."""
        self._claims.give_back(exchange)


def review(exchange: Exchange, grant: Grant) -> None:
    """Judge the call of an exchange in flight again. Raises a Refusal. An approval that it has used stays used."""
    if exchange.tool_call is not None:
        _judge(exchange, exchange.tool_call.tool, grant)


def _judge(exchange: Exchange, tool: Tool | None, grant: Grant, table: ToolTable | None = None) -> None:
    """`table`: of the calls, for a request whose call is not known yet."""
    if exchange.tool_call is None and tool is not None and table is not None:
        # For the records, also of a refusal.
        exchange.tool_call = table.call(tool)
    has_certificate = tool is not None and tool.needs_certificate and _has_certificate(exchange)
    tool_rules.judge(tool, grant.identity, grant.route, has_certificate=has_certificate)


def _has_certificate(exchange: Exchange) -> bool:
    return exchange.peer is not None and exchange.peer.has_certificate


def _check_caller(call: ToolCall, identity: Identity) -> None:
    """Raise a Refusal if the credential has come to stand for another caller since the approval was claimed."""
    caller = call.caller
    if caller is None or caller.owner != identity.owner or caller.lineage != identity.lineage:
        raise Refusal(Reason.KEY_INVALID, "the credential stands for another caller than when its approval was claimed")


def _read(
    exchange: Exchange, head: RequestHead, grant: Grant, payments: Payments, *, rules: ToolRules, now: Moment
) -> None:
    """Read the body of a call. Raises Missing until it has arrived and is read, a Refusal if it is not accepted.

    A request that exceeds a limit whatever its body is refused before that. It counts as concurrent meanwhile.
    """
    allowance = grant.identity.allowance
    if allowance is None or (exchange.is_complete and rules.mcp is None):
        _read_content(exchange, head, rules)
        return
    need = Need(0, 0, route=grant.route.name)
    payments.check(exchange, allowance, need, now=now, asks=not exchange.is_complete)
    try:
        _read_content(exchange, head, rules)
    except Missing:
        payments.take_slots(exchange, allowance, need, now)
        raise


def _read_content(exchange: Exchange, head: RequestHead, rules: ToolRules) -> None:
    if rules.mcp is not None and not exchange.is_complete:
        # Before the body is awaited; the message of a complete one is checked when it is read.
        mcp_message.check_head(head)
    _read_body(exchange, head, rules.body_bytes_max)
    if rules.mcp is not None:
        mcp_requests.read(exchange, head, rules.mcp)


def _read_body(exchange: Exchange, head: RequestHead, bytes_max: int) -> None:
    if max(len(exchange.body), head.content_length) > bytes_max:
        raise _too_large(bytes_max)
    if not exchange.is_complete:
        raise Missing("body", lambda _patience: exchange.whole_body(_too_large(bytes_max), bytes_max=bytes_max))


def _too_large(bytes_max: int) -> Refusal:
    return Refusal(Reason.BODY_TOO_LARGE, caller_text=f"On this route the maximum is {bytes_max} bytes.")
