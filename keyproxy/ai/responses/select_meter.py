"""Select the meter for a response by its route and its head."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.responses import usage_objects
from keyproxy.ai.responses.inflating_meter import InflatingMeter
from keyproxy.ai.responses.json_meter import JsonMeter
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.sse_meter import StreamMeter
from keyproxy.model import ResponseHead, TokenUse

#: The model did not process a request with such a status: without a report it used nothing. Vendors bill none either.
_ERROR_STATUS: Final = 400


def meter_for(kind: str, head: ResponseHead, *, hides_usage: bool = False) -> Meter:
    """Return the meter for one response.

    `kind`: how the route's responses report usage: "openai", "anthropic" or "header". `hides_usage`: the client did not
    request the usage chunk of its stream; it is left out unless the response has a Content-Length or is compressed.
    """
    meter = _meter_for(kind, head, hides_usage=hides_usage and not head.fields.has_content_length)
    if head.line.status >= _ERROR_STATUS:
        meter.unsaid = TokenUse(0, 0)
    return meter


def _meter_for(kind: str, head: ResponseHead, *, hides_usage: bool) -> Meter:
    if kind == "header":
        return Meter(usage_objects.header_use(head.usage_tokens))
    encoding = b", ".join(head.fields.codings) or b"identity"
    is_plain = encoding == b"identity"
    meter: Meter
    if head.fields.media_type == b"text/event-stream":
        meter = StreamMeter(kind, hides_usage=hides_usage and is_plain)
    elif head.fields.is_json:
        meter = JsonMeter(usage_objects.anthropic_use if kind == "anthropic" else usage_objects.openai_use)
    else:
        return Meter()
    if is_plain:
        return meter
    if encoding in (b"gzip", b"x-gzip", b"deflate"):
        return InflatingMeter(meter, is_gzip=encoding != b"deflate")
    return Meter()
