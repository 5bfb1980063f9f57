"""Record a refusal, and send the response to the refused request."""

from __future__ import annotations

from keyproxy.http.routes import ANY_ROUTE
from keyproxy.ports import Exchange
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.context import ServerContext
from keyproxy.wire.responses.response_writer import ResponseWriter


def send(refusal: Refusal, exchange: Exchange, response: ResponseWriter, server: ServerContext) -> bool:
    """Respond with a refusal in the format of the route. Return whether the connection closes after it."""
    head = exchange.head
    shape = _error_shape(exchange, server)
    rendered = server.problems.render(refusal, exchange.request_id.decode("ascii"), shape)
    if exchange.permit is not None and not refusal.applied:
        rendered = rendered._replace(fields=rendered.fields + exchange.permit.limit_headers(server.clock()))
    closes = (
        head is None
        or not exchange.is_complete
        or not head.fields.keeps_alive
        or refusal.reason is Reason.REQUEST_MALFORMED
        or server.is_draining
    )
    is_head = head is not None and head.line.method == b"HEAD"
    exchange.status = rendered.status
    exchange.bytes_out = 0 if is_head else len(rendered.body)
    response.send_own(rendered, server.date_line(), closes=closes, without_body=is_head)
    return closes


def note(refusal: Refusal, exchange: Exchange) -> None:
    """Record the refusal as the outcome of the exchange."""
    exchange.reason = refusal.reason
    exchange.refusal_detail = refusal.detail
    exchange.limit_reason = refusal.limit_reason.value
    if refusal.limit is not None:
        exchange.policy = refusal.limit.policy.name


def _error_shape(exchange: Exchange, server: ServerContext) -> str:
    """The error format of the route; looked up if the request is refused before its route was decided on."""
    if exchange.route is not None:
        return exchange.route.error_shape
    head = exchange.head
    return ANY_ROUTE.error_shape if head is None else server.routes.error_shape(head.line.method, head.line.path)
