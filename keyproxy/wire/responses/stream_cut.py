"""End a stream early: its last event is an error with the reason, in the stream's framing, which is then complete.

A client library raises its own exception on that event, while a reset would look like a failure of the network.
"""

from __future__ import annotations

from keyproxy.ai.dialects.endpoint import StreamFormat
from keyproxy.ai.responses.meter import Meter
from keyproxy.http.error_shapes import bedrock_stream_exception
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import Refusal
from keyproxy.wire.context import ServerContext
from keyproxy.wire.parsing.framing import LAST_CHUNK, chunk
from keyproxy.wire.responses.response_writer import ResponseWriter


def send_error_event(refusal: Refusal, exchange: Exchange, response: ResponseWriter, server: ServerContext) -> bool:
    """End the response with an error event in the format of the route. False: it is not such a stream."""
    meter = exchange.meter
    if exchange.route is None or meter is None or not meter.is_stream or not response.is_chunked:
        return False
    event = _last_event(refusal, exchange, exchange.route.error_shape, meter, server)
    response.end_early((chunk(event) if event else b"") + LAST_CHUNK)
    return True


def _last_event(refusal: Refusal, exchange: Exchange, shape: str, meter: Meter, server: ServerContext) -> bytes:
    problems, request_id = server.problems, exchange.request_id.decode("ascii")
    if meter.format is StreamFormat.SSE:
        return meter.cut(problems.last_event(refusal, request_id, shape, rpc_id=exchange.rpc_id))
    exception = bedrock_stream_exception(problems.status_of(refusal))
    return meter.cut(problems.last_document(refusal, request_id, shape), exception=exception)
