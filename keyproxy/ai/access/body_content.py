"""The content of a request's body, read for judgement in portions: inflated, then scanned as JSON or split as a form."""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.access.access_rules import AccessRules
from keyproxy.ai.access.counted_names import counted_pairs
from keyproxy.ai.access.form_fields import FormReading
from keyproxy.ai.requests.inflation import Inflation, compression_of
from keyproxy.ai.requests.request_facts import ambiguous_type, malformed
from keyproxy.ai.requests.scan_faults import refusal_of
from keyproxy.ai.scanning.json_bounds import JsonError, TooDenseError
from keyproxy.ai.scanning.member_scope import AmbiguousNameError
from keyproxy.ai.scanning.request_parts import DoubledNameError, RequestParts
from keyproxy.ai.scanning.request_scanner import RequestScanner
from keyproxy.http_messages import RequestFields, RequestHead
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

#: The work of one portion, in bytes of text: about two milliseconds.
_PORTION: Final = 131_072
_INFLATION_COST: Final = 32_768

MULTIPART: Final = b"multipart/form-data"
_USUAL: Final = b"application/json"
_PAIRS: Final = b"application/x-www-form-urlencoded"

_BLANK: Final = b" \t\r\n"
#: Some servers remove a byte order mark, or detect UTF-16, and read JSON whatever its type.
_JSON_START: Final = re.compile(rb"[ \t\r\n]*[{\[]")
_OTHER_JSON_START: Final = re.compile(rb"(?:\xef\xbb\xbf[ \t\r\n]*|\xff\xfe|\xfe\xff\x00|\x00)[{\[]")


@mypyc_attr(acyclic=True)
class BodyContent:
    """What is read of a body. `content`: inflated. `parts`: the scan of JSON, None if it is not JSON. `fields`: the
    counting fields of a form."""

    __slots__ = ("content", "fields", "parts")

    def __init__(
        self, content: bytes = b"", parts: RequestParts | None = None, fields: dict[str, str] | None = None
    ) -> None:
        self.content: Final = content
        self.parts: Final = parts
        self.fields: Final[dict[str, str]] = {} if fields is None else fields


class ContentReading:
    """A complete body that is being read. `result` is set once `advance` has returned True."""

    def __init__(self, rules: AccessRules, head: RequestHead, body: bytes) -> None:
        """Raises a Refusal (BODY_TOO_LARGE, REQUEST_MALFORMED), as `advance` does."""
        self.result: BodyContent | None = None
        self._rules: Final = rules
        self._head: Final = head
        self._content = body
        bounds = rules.bounds
        if len(body) > bounds.bytes_max:
            raise Refusal(Reason.BODY_TOO_LARGE, f"it has more than {bounds.bytes_max} bytes")
        codings = head.fields.codings
        bits = compression_of(codings, body) if codings else None
        self._inflation: Inflation | None = None
        if bits is not None:
            self._inflation = Inflation(body, bits, bytes_max=bounds.bytes_max, ratio_max=bounds.inflate_ratio_max)
        self._scanner: RequestScanner | None = None
        self._parts: RequestParts | None = None
        self._form: FormReading | None = None

    def advance(self) -> bool:
        """Read the next portion; return whether it was the last."""
        budget = _PORTION
        while self._inflation is not None:
            if self._inflation.advance():
                self._content = self._inflation.content
                self._inflation = None
            budget -= _INFLATION_COST
            if budget <= 0:
                return False
        scanner = self._scanner
        if scanner is None:
            if not self._is_json():
                self.result = self._read_other()
                return self.result is not None
            scope = self._rules.scope
            parts = self._parts = RequestParts(self._content, has_image_arrays=False, instructions=scope.instructions)
            scanner = self._scanner = RequestScanner(self._content, scope, self._rules.bounds.json, parts)
        try:
            if scanner.advance(budget) <= 0:
                return False
        except (JsonError, TooDenseError, AmbiguousNameError, DoubledNameError) as fault:
            raise refusal_of(fault) from fault
        self.result = BodyContent(self._content, self._parts)
        return True

    def _is_json(self) -> bool:
        fields, content = self._head.fields, self._content
        if is_form(fields):
            return False
        if fields.is_json:
            return bool(content.strip(_BLANK))
        return _JSON_START.match(content) is not None

    def _read_other(self) -> BodyContent | None:
        head, content, names = self._head, self._content, self._rules.form_names
        if not names or not content:
            return BodyContent(content)
        media_type = head.fields.media_type
        if media_type == MULTIPART:
            form = self._form
            if form is None:
                form = self._form = FormReading(content, content_type(head.block), names)
            return BodyContent(content, fields=form.fields) if form.advance() else None
        # Some servers parse JSON whatever its type.
        if _JSON_START.match(content) or _OTHER_JSON_START.match(content):
            raise malformed("The body looks like JSON, but its Content-Type is another.")
        if media_type == _PAIRS:
            return BodyContent(content, fields=counted_pairs(content, names, "form"))
        return BodyContent(content)


def check_media_type(rules: AccessRules, fields: RequestFields) -> None:
    """Raise a Refusal (REQUEST_MALFORMED) unless a body of this type can have the values that the rules read."""
    if not fields.has_clear_type:
        raise ambiguous_type()
    if fields.media_type == _USUAL and not rules.reads_form:
        return
    if fields.codings and (is_form(fields) or not fields.media_type):
        # Servers that ignore Content-Encoding read the compressed bytes, which may contain pairs of another form.
        raise malformed("A form, or a body without Content-Type, must not be compressed on this route.")
    if rules.reads_json and (is_form(fields) or not fields.is_json):
        raise malformed("The body must be JSON on this route, with Content-Type: application/json.")
    if rules.reads_form and fields.media_type != MULTIPART:
        raise malformed("The body must be a form on this route, with Content-Type: multipart/form-data.")


def check_untyped(rules: AccessRules, fields: RequestFields, content: bytes) -> None:
    """Raise a Refusal (REQUEST_MALFORMED) for JSON without a type that is also a form with a counting name.

    Rack reads a POST without a Content-Type as a form.
    """
    if not fields.media_type and b"&" in content and counted_pairs(content, rules.untyped_names, "body"):
        raise malformed("The body can be read as a form: send Content-Type: application/json.")


def is_form(fields: RequestFields) -> bool:
    """Whether the body has a type of forms."""
    return fields.media_type in (MULTIPART, _PAIRS)


def content_type(block: bytes) -> bytes:
    """The value of Content-Type among header lines; empty without one. It occurs once, or twice with the same value."""
    for line in block.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-type":
            return value.strip(b" \t")
    return b""
