"""What a request asks for, from the scan of its JSON: model, maximum, multipliers, stream, and its estimated input."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import Dialect, DialectEndpoint, StreamSwitch
from keyproxy.ai.dialects.table import DIALECTS
from keyproxy.ai.requests.model_lists import NAMES_MAX, named_in
from keyproxy.ai.scanning.content_media import MediaCount
from keyproxy.ai.scanning.member_scope import ALTERNATIVES
from keyproxy.ai.scanning.request_parts import RequestParts
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

#: A larger number of tokens is not credible, and would overflow the sums.
TOKENS_MAX: Final = 10**12
#: Products of a maximum and its multipliers are clamped to this: no budget has so many tokens.
_PRODUCT_MAX: Final = 10**15

_NULL: Final = b"null"

#: By dialect: members whose value must be an object, because the maximum stands in it; and the members of the output.
_OBJECTS: Final = {
    dialect.name: frozenset({"stream_options", *(path[0] for path in dialect.usual.maximums if len(path) > 1)})
    for dialect in DIALECTS.values()
}
_MAXIMUMS: Final = {
    dialect.name: tuple([(".".join(path), path) for path in dialect.usual.maximums]) for dialect in DIALECTS.values()
}
_MULTIPLIERS: Final = {
    dialect.name: tuple([(".".join(path), path) for path in dialect.usual.multipliers]) for dialect in DIALECTS.values()
}
_THINKING: Final = {dialect.name: tuple([".".join(path) for path in dialect.thinking]) for dialect in DIALECTS.values()}
_WORDS: Final = {b"true": "is a boolean", b"false": "is a boolean"}


@mypyc_attr(acyclic=True)
class RequestFacts:
    """What one request asks for.

    `model`: as its JSON names it; None if it does not. `alternatives`: models that the upstream may use instead.
    `maximum`: the largest maximum that it states, before `multiplier`; None without one. `thinking`: the stated budget
    for reasoning. `streams`: it asks for a stream. `lacks_usage`: for a stream that will not report its usage.
    `reference`: it refers to content that it does not contain: `file`, `url`, `prompt` or `conversation`; else empty.
    `input_override`: the input of a request that is not read; None if it is.
    `parts`: for the edits; None unless it is a JSON object.
    """

    __slots__ = (
        "alternatives", "array_numbers", "content_bytes", "dialect", "endpoint", "has_tools", "input_override",
        "lacks_usage", "maximum", "media", "message_objects", "model", "multiplier", "parts", "reference", "streams",
        "text_tokens", "thinking",
    )  # fmt: skip

    def __init__(
        self, dialect: Dialect, endpoint: DialectEndpoint, content_bytes: int, media: MediaCount | None = None
    ) -> None:
        self.dialect: Final = dialect
        self.endpoint: Final = endpoint
        self.content_bytes: Final = content_bytes
        self.model: str | None = None
        self.alternatives: tuple[str, ...] = ()
        self.maximum: int | None = None
        self.multiplier = 1
        self.thinking: int | None = None
        self.streams = False
        self.lacks_usage = False
        self.text_tokens = 0
        self.message_objects = 0
        self.array_numbers = 0
        self.media: Final = MediaCount() if media is None else media
        self.has_tools = False
        self.reference = ""
        self.input_override: int | None = None
        self.parts: RequestParts | None = None


def facts_of(
    parts: RequestParts, dialect: Dialect, endpoint: DialectEndpoint, *, content_bytes: int, model_member: str
) -> RequestFacts:
    """Interpret a scanned document. Raises a Refusal (REQUEST_MALFORMED) that names the member at fault."""
    facts = RequestFacts(dialect, endpoint, content_bytes, parts.media.count)
    facts.text_tokens = parts.text.estimate.tokens()
    facts.array_numbers = parts.array_numbers
    facts.message_objects = parts.message_objects
    facts.has_tools = parts.has_tools
    facts.reference = parts.media.reference
    facts.streams = endpoint.streams is StreamSwitch.PATH
    if not parts.is_object:
        return facts
    facts.parts = parts
    _check_objects(parts, dialect)
    facts.model = _string(parts, model_member)
    if model_member != "model":
        _string(parts, "model")
    facts.alternatives = _alternatives(parts)
    # Members of other endpoints are checked too: servers accept more than their documentation lists.
    values, is_ollama = parts.values, dialect.name == "ollama"
    for name, path in _MAXIMUMS[dialect.name]:
        if name in values:
            count = _count(name, values[name], negative_is_absent=is_ollama)
            if count is not None and path in endpoint.maximums:
                facts.maximum = count if facts.maximum is None else max(facts.maximum, count)
    times = 1
    for name, path in _MULTIPLIERS[dialect.name]:
        if name in values:
            count = _count(name, values[name], negative_is_absent=False)
            if count is not None and path in endpoint.multipliers:
                times = max(times, count)
    if endpoint.prompts:
        times *= max(1, parts.prompts)
    facts.multiplier = min(times, _PRODUCT_MAX)
    for name in _THINKING[dialect.name]:
        if name in values:
            facts.thinking = _count(name, values[name], negative_is_absent=True)
    _read_stream(facts, parts, endpoint, dialect)
    return facts


def multiplied(tokens: int, multiplier: int) -> int:
    """The product, at most a number that no budget has."""
    return min(tokens * multiplier, _PRODUCT_MAX)


def malformed(message: str, field: str | None = None) -> Refusal:
    """Build the refusal of a body, with a complete message. `field`: the member at fault."""
    return Refusal(Reason.REQUEST_MALFORMED, message, caller_text=message, replaces_sentence=True, field=field)


def ambiguous_type() -> Refusal:
    """Build the refusal of a body that servers decode in different ways."""
    return malformed("Content-Type must name one media type, and no charset but UTF-8.")


def _read_stream(facts: RequestFacts, parts: RequestParts, endpoint: DialectEndpoint, dialect: Dialect) -> None:
    value = parts.values.get("stream") if dialect.streams_by_member else None
    if value not in (None, b"true", b"false", _NULL):
        raise malformed(f"'stream' {_fault(value)}; it must be true or false.", "stream")
    if endpoint.streams is StreamSwitch.MEMBER:
        facts.streams = value == b"true"
    elif endpoint.streams is StreamSwitch.MEMBER_UNLESS_FALSE:
        facts.streams = value != b"false"
    if facts.streams and endpoint.adds_include_usage:
        facts.lacks_usage = parts.values.get("stream_options.include_usage") != b"true"


def _check_objects(parts: RequestParts, dialect: Dialect) -> None:
    """Refuse a member that has counting members and is no object: some servers coerce it."""
    objects = _OBJECTS[dialect.name]
    for name, value in parts.values.items():
        if name in objects and not isinstance(value, dict) and value != _NULL:
            raise malformed(f"'{name}' {_fault(value)}; it must be an object.", name)


def _count(name: str, value: object, *, negative_is_absent: bool) -> int | None:
    """A whole number; None for null."""
    if value == _NULL:
        return None
    number = _number(value)
    if isinstance(number, int):
        if number < 0 and negative_is_absent:
            return None
        if 0 <= number <= TOKENS_MAX:
            return number
    raise malformed(f"'{name}' {_fault(value)}; it must be a whole number from 0 to {TOKENS_MAX}.", name)


def _number(value: object) -> int | float | None:
    if not isinstance(value, bytes) or value in _WORDS:
        return None
    digits = value[1:] if value.startswith(b"-") else value
    if digits.isdigit():
        # A number with more digits is too large in any case, and takes long to convert.
        return int(value) if len(digits) <= 18 else (-1 if value.startswith(b"-") else TOKENS_MAX + 1)
    try:
        return float(value)
    except ValueError:
        return None


def _fault(value: object) -> str:
    """Describe why a value is not as expected, without repeating it."""
    if isinstance(value, str):
        return "is a string"
    if isinstance(value, dict):
        return "is an object"
    if isinstance(value, list):
        return "is an array"
    if isinstance(value, bytes) and value in _WORDS:
        return _WORDS[value]
    if value == _NULL:
        return "is null"
    number = _number(value)
    if number is None:
        return "is of another type"
    if number < 0:
        return "is negative"
    if number > TOKENS_MAX:
        return "is too large"
    return "is a number" if isinstance(number, int) else "has a fraction or an exponent"


def _string(parts: RequestParts, name: str) -> str | None:
    value = parts.values.get(name)
    if value is None or value == _NULL:
        return None
    if not isinstance(value, str):
        raise malformed(f"'{name}' {_fault(value)}; it must be a string.", name)
    return value


def _alternatives(parts: RequestParts) -> tuple[str, ...]:
    """The models of the lists of alternatives. Raises a Refusal for a list of another shape."""
    found: list[str] = []
    for name in ALTERNATIVES:
        if name not in parts.values:
            continue
        start, end = parts.spans[name]
        found += named_in(parts.content[start:end], name)
    if not found:
        return ()
    names = tuple(dict.fromkeys(found))
    if len(names) > NAMES_MAX:
        raise malformed(f"The request names more than {NAMES_MAX} models.", "models")
    return names
