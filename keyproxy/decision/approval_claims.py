"""Claim the approval of one call before anything of it is sent, and give it back if nothing was sent.

    digest of the call -> claimed -> sent: used for good
                              `---> limits refuse, no connection, client gone: given back

The claim is one transaction of the store, so that no two requests use the same approval. What is bound to it is what
was received: the digest covers the body before a metered route changes it.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.tools.call_digest import canonical_params, http_digest, mcp_digest
from keyproxy.ai.tools.call_summary import CalledWith, call_summary
from keyproxy.ai.tools.canonical_json import CanonicalJson
from keyproxy.ai.tools.tool_call import ToolCall, ToolClaim
from keyproxy.auth import credentials
from keyproxy.auth.api_key import KeyFormat
from keyproxy.http_messages import RequestHead
from keyproxy.model import Grant, Identity, Missing, TimeBudget
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.tools import ApprovalRequest, Approvals
from keyproxy.reasons import Refusal

#: JSON up to this size is read at once: that costs no more than to wait for a turn.
_AT_ONCE_BYTES: Final = 65_536


class ApprovalClaims:
    """The approvals that the requests of one gateway claim."""

    def __init__(self, approvals: Approvals, key_format: KeyFormat) -> None:
        self._approvals: Final = approvals
        self._key_format: Final = key_format

    def claiming(self, exchange: Exchange, head: RequestHead, grant: Grant, call: ToolCall) -> Missing:
        """The Missing whose fetch claims the approval of a call, whose body has arrived completely."""

        async def claimed(patience: TimeBudget) -> None:
            request = await self._request(exchange, head, grant, call)
            if request is not None:
                call.digest = request.digest
                self._keep(exchange, call, await self._approvals.claim(request, patience), grant.identity)

        return Missing("approval", claimed)

    def give_back(self, exchange: Exchange) -> None:
        """Give back what an exchange that has ended has claimed, unless a byte of it was sent."""
        call = exchange.tool_call
        if call is not None and call.claim is not None and not exchange.sent_mono:
            claim, call.claim = call.claim, None
            self._approvals.give_back(claim)

    def _keep(self, exchange: Exchange, call: ToolCall, claim: ToolClaim, caller: Identity) -> None:
        if exchange.is_over:
            # Its end has come before the claim, so nothing else gives it back.
            self._approvals.give_back(claim)
        else:
            call.claim = claim
            call.caller = caller

    async def _request(
        self, exchange: Exchange, head: RequestHead, grant: Grant, call: ToolCall
    ) -> ApprovalRequest | None:
        """What to claim; None: the exchange is over. Raises a Refusal if the parameters of an MCP call are ambiguous."""
        identity, route, tool, body = grant.identity, grant.route, call.tool, exchange.body
        message = None if exchange.mcp is None else exchange.mcp.message
        if message is not None:
            reading = canonical_params(message.params)
            await _read(exchange, reading)
            arguments: bytes | None = reading.members.get(b'"arguments"', b"{}")
        else:
            arguments = await _json_body(exchange, head, body)
        if exchange.is_over:
            return None
        if message is not None:
            digest = mcp_digest(identity, route.name, tool, head=head, params=reading.text)
        else:
            digest = http_digest(identity, route.name, tool, head=head, body=body)
        address = b"" if exchange.peer is None else exchange.peer.recorded_address(head)
        client = address.decode("ascii") if address else None
        summary = call_summary(
            identity, tool, head, CalledWith(body, head.fields.media_type, arguments),
            digest=digest, client=client, holds_key=lambda text: credentials.shows_key(head, text, self._key_format),
        )  # fmt: skip
        return ApprovalRequest(digest, identity, tool.name, tool.approval, summary, client)


async def _json_body(exchange: Exchange, head: RequestHead, body: bytes) -> bytes | None:
    """The body of a plain HTTP call in canonical JSON; None if it is none that all servers read alike."""
    fields = head.fields
    if not body or not fields.is_json or not fields.has_clear_type or fields.codings:
        return None
    reading = CanonicalJson(body)
    try:
        body.decode("utf-8")
        await _read(exchange, reading)
    except (UnicodeDecodeError, Refusal):
        return None
    return reading.text


async def _read(exchange: Exchange, reading: CanonicalJson) -> None:
    if reading.size <= _AT_ONCE_BYTES:
        reading.whole()
    else:
        await exchange.in_turns(reading.advance)
