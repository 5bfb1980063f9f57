"""Record refusals, and send the responses of the proxy itself: to refused requests, and to those that it serves."""

from __future__ import annotations

from keyproxy.ai.tools.mcp_message import rpc_id_in
from keyproxy.http.error_shapes import MCP
from keyproxy.http.own_response import OwnResponse
from keyproxy.http.routes import ANY_ROUTE
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import LimitReason, Reason, Refusal
from keyproxy.wire.context import ServerContext
from keyproxy.wire.responses import response_heads
from keyproxy.wire.responses.response_writer import ResponseWriter


def send(refusal: Refusal, exchange: Exchange, response: ResponseWriter, server: ServerContext) -> bool:
    """Respond with a refusal in the format of the route. Return whether the connection closes after it."""
    shape = _error_shape(exchange, server)
    request_id, route = exchange.request_id.decode("ascii"), exchange.route
    rendered = server.problems.render(
        refusal,
        request_id,
        shape,
        rpc_id=_rpc_id(exchange, shape),
        route_scopes=() if route is None else route.scopes | route.tool_scopes,
    )
    if exchange.permit is not None and not refusal.applied:
        rendered = rendered._replace(fields=rendered.fields + exchange.permit.limit_headers(server.clock()))
    closes = refusal.reason is Reason.REQUEST_MALFORMED
    return _send(rendered, exchange, response, server, closes=closes)


def send_served(served: OwnResponse, exchange: Exchange, response: ResponseWriter, server: ServerContext) -> bool:
    """Respond to a request that the proxy serves itself. Return whether the connection closes after it."""
    served = served._replace(fields=served.fields + response_heads.own_lines(exchange, server))
    return _send(served, exchange, response, server, closes=False)


def _send(
    own: OwnResponse, exchange: Exchange, response: ResponseWriter, server: ServerContext, *, closes: bool
) -> bool:
    head = exchange.head
    if head is None or not exchange.is_complete or not head.fields.keeps_alive or server.is_draining:
        closes = True
    is_head = head is not None and head.line.method == b"HEAD"
    exchange.status = own.status
    exchange.bytes_out = 0 if is_head else len(own.body)
    response.send_own(head, own, server.date_line(), closes=closes)
    return closes


def note(refusal: Refusal, exchange: Exchange) -> None:
    """Record the refusal as the outcome of the exchange."""
    exchange.reason = refusal.reason
    exchange.refusal_detail = refusal.detail
    if refusal.limit_reason is not LimitReason.NONE:
        exchange.limit_reason = refusal.limit_reason.value
    if refusal.limit is not None:
        exchange.policy = refusal.limit.policy.name
    if refusal.members is not None:
        approval_id = refusal.members.get("approval_id")
        if isinstance(approval_id, str):
            exchange.approval_id = approval_id


def _rpc_id(exchange: Exchange, shape: str) -> bytes:
    """The id for a JSON-RPC error. That of an identified client is found even if its message was not read."""
    if exchange.rpc_id or shape != MCP or exchange.identity is None or not exchange.is_complete:
        return exchange.rpc_id
    return rpc_id_in(exchange.body)


def _error_shape(exchange: Exchange, server: ServerContext) -> str:
    """The error format of the route; looked up if the request is refused before its route was decided on."""
    if exchange.route is not None:
        return exchange.route.error_shape
    head = exchange.head
    return ANY_ROUTE.error_shape if head is None else server.routes.error_shape(head.line)
