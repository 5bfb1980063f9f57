"""Read a request's body in portions, so that other work runs between two of them.

    inflating -> scanning -> read

Each call of `advance` does a few milliseconds of work. The memory is that of the inflated content and a few slices.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import Dialect, DialectEndpoint
from keyproxy.ai.requests.inflation import ContentMemory, Inflation, compression_of
from keyproxy.ai.requests.request_facts import RequestFacts, ambiguous_type, facts_of
from keyproxy.ai.requests.scan_faults import refusal_of
from keyproxy.ai.scanning.content_media import AUDIO, IMAGE, VIDEO, media_kind
from keyproxy.ai.scanning.json_bounds import JsonBounds, JsonError, TooDenseError
from keyproxy.ai.scanning.json_grammar import Utf8
from keyproxy.ai.scanning.member_scope import NO_MEMBERS, AmbiguousNameError, JudgedMembers, MemberScope, scope_of
from keyproxy.ai.scanning.request_parts import DoubledNameError, RequestParts
from keyproxy.ai.scanning.request_scanner import RequestScanner
from keyproxy.ai.text_estimate import TextEstimate
from keyproxy.http_messages import RequestFields
from keyproxy.reasons import Reason, Refusal

#: The work of one portion, in bytes of text: about two milliseconds.
_PORTION: Final = 131_072
_INFLATION_COST: Final = 32_768
_SLICE_BYTES: Final = 32_768

#: A form is sent on as it arrives. Its files are larger than their tokens.
_FORM_BYTES_A_TOKEN: Final = 250
_MULTIPART: Final = b"multipart/"

_SPACE: Final = b" \t\r\n"


class BodyBounds:
    """The largest bodies that are read."""

    __slots__ = ("bytes_max", "inflate_ratio_max", "json")

    def __init__(self, bytes_max: int = 8_388_608, inflate_ratio_max: int = 64, json: JsonBounds | None = None) -> None:
        self.bytes_max: Final = bytes_max
        self.inflate_ratio_max: Final = inflate_ratio_max
        self.json: Final = JsonBounds() if json is None else json


class ReadingRules:
    """How requests of one route are read: made when the configuration is loaded.

    `model_member`: the JSON member that names the model; empty: JSON does not name it. `judged`: further members that
    count.
    """

    __slots__ = ("bounds", "dialect", "model_member", "scope")

    def __init__(
        self,
        dialect: Dialect,
        bounds: BodyBounds,
        *,
        model_member: str | None = None,
        judged: JudgedMembers = NO_MEMBERS,
    ) -> None:
        if model_member is None:
            model_member = "model" if dialect.model_member else ""
        self.dialect: Final = dialect
        self.bounds: Final = bounds
        self.model_member: Final = model_member
        self.scope: Final[MemberScope] = scope_of(dialect, model_member or "model", judged)


def is_collected(fields: RequestFields) -> bool:
    """Whether the body is collected before it is forwarded. A multipart form is not."""
    return not fields.media_type.startswith(_MULTIPART)


def facts_of_form(rules: ReadingRules, endpoint: DialectEndpoint, content_length: int) -> RequestFacts:
    """The facts of a request whose body is not collected. `content_length`: less than 0: it is not known."""
    facts = RequestFacts(rules.dialect, endpoint, max(0, content_length))
    if content_length < 0:
        facts.reference = "body"
    else:
        facts.input_override = -(-content_length // _FORM_BYTES_A_TOKEN)
    return facts


class RequestReading:
    """A complete body that is being read. `facts` is set once `advance` has returned True, and `parts` if it is JSON.

    `content`: the inflated body, `bits`: zlib's number for its compression, None for none.
    """

    def __init__(
        self,
        rules: ReadingRules,
        endpoint: DialectEndpoint,
        fields: RequestFields,
        body: bytes,
        *,
        memory: ContentMemory | None = None,
    ) -> None:
        """Raises a Refusal (BODY_TOO_LARGE, REQUEST_MALFORMED), as `advance` does. `memory`: of the inflated content."""
        self.facts: RequestFacts | None = None
        self.parts: RequestParts | None = None
        self.content = body
        self._rules: Final = rules
        self._endpoint: Final = endpoint
        self._fields: Final = fields
        bounds = rules.bounds
        if len(body) > bounds.bytes_max:
            raise Refusal(Reason.BODY_TOO_LARGE, f"it has more than {bounds.bytes_max} bytes")
        self.bits: Final = compression_of(fields.codings, body) if fields.codings else None
        self._inflation: Inflation | None = None
        if self.bits is not None:
            self._inflation = Inflation(
                body, self.bits, bytes_max=bounds.bytes_max, ratio_max=bounds.inflate_ratio_max, memory=memory
            )
        self._scanner: RequestScanner | None = None
        self._scanned: RequestParts | None = None
        self._plain: _PlainText | None = None

    def advance(self) -> bool:
        """Read the next portion; return whether it was the last."""
        budget = _PORTION
        while self._inflation is not None:
            if self._inflation.advance():
                self.content = self._inflation.content
                self._inflation = None
            budget -= _INFLATION_COST
            if budget <= 0:
                return False
        if self._scanner is None and self._plain is None:
            self._begin()
        if self._scanner is not None and self._scanned is not None:
            return self._scan(self._scanner, self._scanned, budget)
        return self._plain is not None and self._read_plain(self._plain, budget)

    def _begin(self) -> None:
        rules, content = self._rules, self.content
        first = content[:1] if content[:1] not in (b" ", b"\t", b"\r", b"\n") else content.lstrip(_SPACE)[:1]
        # Many servers parse JSON regardless of the Content-Type.
        if first in (b"{", b"[") or (self._fields.is_json and first):
            if not self._fields.has_clear_type:
                raise ambiguous_type()
            scope, has_image_arrays = rules.scope, rules.dialect.has_image_arrays
            parts = RequestParts(content, has_image_arrays=has_image_arrays, instructions=scope.instructions)
            self._scanned, self._scanner = parts, RequestScanner(content, scope, rules.bounds.json, parts)
        else:
            self._plain = _PlainText(content)

    def _scan(self, scanner: RequestScanner, parts: RequestParts, budget: int) -> bool:
        try:
            if scanner.advance(budget) <= 0:
                return False
        except JsonError as not_json:
            if not self._fields.is_json:
                self._scanner = self._scanned = None
                self._plain = _PlainText(self.content)
                return False
            raise refusal_of(not_json) from not_json
        except (TooDenseError, AmbiguousNameError, DoubledNameError) as fault:
            raise refusal_of(fault) from fault
        rules = self._rules
        self.parts = parts
        self.facts = facts_of(
            parts, rules.dialect, self._endpoint,
            content_bytes=len(self.content), model_member=rules.model_member,
        )  # fmt: skip
        return True

    def _read_plain(self, plain: _PlainText, budget: int) -> bool:
        if not plain.advance(budget):
            return False
        facts = self.facts = RequestFacts(self._rules.dialect, self._endpoint, len(self.content))
        kind = media_kind(self._fields.media_type, 0)
        if kind in (IMAGE, AUDIO, VIDEO):
            facts.media.add(kind, len(self.content))
        elif plain.is_blank:
            facts.input_override = 0
        elif plain.is_text:
            facts.text_tokens = plain.estimate.tokens()
        else:
            facts.input_override = len(self.content)
        return True


class _PlainText:
    """Content that is not read as JSON."""

    def __init__(self, content: bytes) -> None:
        self.estimate = TextEstimate()
        self.is_text = True
        self.is_blank = True
        self._content: Final = content
        self._utf8: Final = Utf8()
        self._at = 0

    def advance(self, budget: int) -> bool:
        """Read on; return whether that was all."""
        while budget > 0 and self._at < len(self._content) and self.is_text:
            piece = self._content[self._at : self._at + _SLICE_BYTES]
            if self._utf8.takes(piece):
                self.estimate.add(piece, continues=self._at > 0)
            else:
                self.is_text = False
            self.is_blank = self.is_blank and not piece.strip(_SPACE)
            self._at += len(piece)
            budget -= len(piece)
        return self._at >= len(self._content) or not self.is_text
