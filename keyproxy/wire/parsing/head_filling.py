"""Build heads of a known shape from the values that differ between them."""

from __future__ import annotations

from typing import Final

from keyproxy.http_messages import (
    CredentialField,
    RequestFields,
    RequestHead,
    RequestLine,
    ResponseFields,
    ResponseHead,
    StatusLine,
)
from keyproxy.wire.parsing.head_templates import CRLF, Shape
from keyproxy.wire.parsing.header_fields import ParsedFields

_OWS: Final = b" \t"
_SPACE: Final = 0x20
_ZERO: Final = 0x30


def filled_request(line: RequestLine, shape: Shape[RequestFields], values: tuple[bytes, ...]) -> RequestHead:
    """Build a request head of a known shape."""
    credentials = [CredentialField(name, _stripped(values[place])) for place, name in shape.credentials]
    content_length = _number(values[shape.content_length]) if shape.content_length >= 0 else 0
    head = RequestHead(line, shape.fields, shape.block(values), tuple(credentials), content_length)
    if shape.request_id >= 0:
        head.request_id = _stripped(values[shape.request_id])
    if shape.act_for >= 0:
        head.act_for = values[shape.act_for].strip(_OWS)
    if shape.traceparent >= 0:
        head.traceparent = values[shape.traceparent]
    if shape.forwarded:
        head.forwarded = tuple([(name, values[place].strip(_OWS)) for place, name in shape.forwarded])
    return head


def filled_response(line: StatusLine, shape: Shape[ResponseFields], values: tuple[bytes, ...]) -> ResponseHead:
    """Build a response head of a known shape."""
    content_length = _number(values[shape.content_length]) if shape.content_length >= 0 else 0
    head = ResponseHead(line, shape.fields, shape.block(values), content_length)
    if shape.usage_tokens >= 0:
        head.usage_tokens = values[shape.usage_tokens].strip(_OWS)
    return head


def _stripped(value: bytes) -> bytes:
    """The value without optional whitespace around it, which few have: the method copies all."""
    if value and value[0] > _SPACE and value[-1] > _SPACE:
        return value
    return value.strip(_OWS)


def _number(digits: bytes) -> int:
    """The value of decimal digits. `int` takes eight times as many instructions for a short number."""
    number = 0
    for digit in digits:
        number = number * 10 + digit - _ZERO
    return number


def are_equal(credentials: tuple[CredentialField, ...], others: tuple[CredentialField, ...]) -> bool:
    """Whether two heads have the same credentials."""
    if len(credentials) == 1 and len(others) == 1:
        return credentials[0].value == others[0].value and credentials[0].name == others[0].name
    return credentials == others


def forwarded_block(lines: list[bytes], parsed: ParsedFields) -> bytes:
    """Return the forwarded lines of a head that was just parsed, with Content-Length in canonical form."""
    place = parsed.content_length_place
    if place >= 0:
        lines = [*lines]
        lines[place] = b"%b: %d" % (lines[place].partition(b":")[0], parsed.content_length or 0)
    return b"".join([line + CRLF for line, goes_on in zip(lines, parsed.is_forwarded, strict=True) if goes_on])
