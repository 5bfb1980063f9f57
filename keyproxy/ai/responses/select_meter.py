"""Select the meter for a response by its endpoint and its head."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import Dialect, DialectEndpoint, StreamFormat
from keyproxy.ai.responses.body_meter import MediaMeter, TextMeter, UnreadMeter
from keyproxy.ai.responses.inflating_meter import InflatingMeter
from keyproxy.ai.responses.json_meter import JsonMeter
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.streams.array_meter import ArrayMeter
from keyproxy.ai.responses.streams.aws_meter import AwsMeter
from keyproxy.ai.responses.streams.line_meter import LineMeter
from keyproxy.ai.responses.streams.sse_meter import SseMeter
from keyproxy.ai.responses.streams.stream_reading import StreamReading
from keyproxy.ai.responses.usage_objects import header_report
from keyproxy.ai.responses.usage_reader import ResponseUsageReader
from keyproxy.http_messages import ResponseHead

_EVENTS: Final = b"text/event-stream"
_LINES: Final = (b"application/x-ndjson", b"application/ndjson", b"application/jsonl")
_AWS_EVENTS: Final = b"application/vnd.amazon.eventstream"


def meter_for(
    dialect: Dialect, endpoint: DialectEndpoint, head: ResponseHead, *, choices: int = 1, hides_usage: bool = False
) -> Meter:
    """Return the meter for one response.

    `choices`: the number of alternatives that the request asks for. `hides_usage`: the client did not request the usage
    chunk of its stream; it is left out unless the response has a Content-Length or is compressed.
    """
    fields = head.fields
    encoding = b", ".join(fields.codings) if fields.codings else b"identity"
    is_plain = encoding == b"identity"
    usage = ResponseUsageReader(dialect, endpoint, choices)
    if not endpoint.usage:
        usage.report = usage.reported_input = header_report(head.usage_tokens)
    media_type = fields.media_type
    meter: Meter
    if media_type == _EVENTS:
        reading = StreamReading(dialect, endpoint, usage)
        meter = SseMeter(reading, hides_usage=hides_usage and is_plain and not fields.has_content_length)
    elif media_type in _LINES:
        meter = LineMeter(StreamReading(dialect, endpoint, usage))
    elif media_type == _AWS_EVENTS:
        meter = AwsMeter(StreamReading(dialect, endpoint, usage))
    elif fields.is_json:
        is_array = StreamFormat.JSON_ARRAY in endpoint.formats
        meter = ArrayMeter(StreamReading(dialect, endpoint, usage)) if is_array else JsonMeter(dialect, endpoint, usage)
    elif media_type.startswith(b"text/"):
        meter = TextMeter(usage)
    else:
        meter = MediaMeter(usage)
    if is_plain or type(meter) is MediaMeter:
        return meter
    if encoding in (b"gzip", b"x-gzip", b"deflate"):
        return InflatingMeter(meter, is_gzip=encoding != b"deflate")
    return UnreadMeter(usage)
