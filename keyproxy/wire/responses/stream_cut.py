"""End a stream of server-sent events early: its last event is an error with the reason, and the framing is complete.

A client library raises its own exception on that event, while a reset would look like a failure of the network.
"""

from __future__ import annotations

from keyproxy.ports import Exchange
from keyproxy.reasons import Refusal
from keyproxy.wire.context import ServerContext
from keyproxy.wire.parsing.framing import LAST_CHUNK, chunk
from keyproxy.wire.responses.response_writer import ResponseWriter


def send_error_event(refusal: Refusal, exchange: Exchange, response: ResponseWriter, server: ServerContext) -> bool:
    """End the response with an error event in the format of the route. False: it is not such a stream."""
    meter = exchange.meter
    if exchange.route is None or meter is None or not meter.is_stream or not response.is_chunked:
        return False
    event = server.problems.last_event(refusal, exchange.request_id.decode("ascii"), exchange.route.error_shape)
    response.end_early(chunk(meter.cut(event)) + LAST_CHUNK)
    return True
