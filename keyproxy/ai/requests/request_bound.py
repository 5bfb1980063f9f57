"""Bound what a request may use: an upper bound of its prompt's tokens, and the maximum of its output tokens.

The prompt's bound is the length of the request. A token of a byte-level vocabulary is at least one byte of text; JSON
only makes text longer; and a chat template adds less around a message than the JSON around it. Content other than text
has its own bounds, below. Content that the upstream adds (an earlier response, a stored prompt, a file referenced by
its id, the results of a built-in tool) is not visible here: it is known when the response reports it.

The bound is valid only if the upstream parses the request in the same way. So a body that two parsers could read
differently in a significant place (a duplicate maximum, or one spelt with capitals, which some parsers match) is
refused, and so is a maximum that is no whole number. Only the length of the prompt is used; it is stored nowhere.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, Final

import orjson

from keyproxy.ai.requests.include_usage import with_usage
from keyproxy.ai.requests.member_names import DECISIVE, Outline, matters, outline_of
from keyproxy.ai.requests.outline_scanner import PIECE_BYTES, JsonError, OutlineScanner
from keyproxy.ai.responses.inflating_meter import window_bits
from keyproxy.ai.responses.usage_objects import TOKENS_MAX, is_count
from keyproxy.model import RequestHead
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

#: An image, a sound or a document, over and above its bytes; an image that is sent along counts without its bytes.
#: OpenAI's and Anthropic's current models see at most 1,445 and 4,784 tokens in an image (gpt-4o-mini: 48,169).
MEDIA_TOKENS: Final = 5_000

#: What Anthropic adds before a prompt with tools: 264 to 804 tokens by its documentation.
TOOLS_TOKENS: Final = 1_000

#: Content up to this is parsed in one call; a parser's values may take 35 times as much memory.
PARSED_BYTES_MAX: Final = 65_536

#: A module constant, which saves the compiled build a lookup.
_loads: Final = orjson.loads

#: The output to reserve for a request that sets no maximum.
OUTPUT_DEFAULT: Final = 4_096

#: Larger products are clamped to this: no budget has so many.
_MAXIMUM_MAX: Final = 10**15

#: The start of an escape, with which a name can have another spelling. A single byte is found fast with `in`; a longer
#: needle takes three times as long as with `find`, since `in` tries it as a number first.
_ESCAPE: Final = b"\\u"
_BACKSLASH: Final = 0x5C
IMAGES: Final = frozenset({"image", "image_url", "input_image"})
MEDIA: Final = IMAGES | {
    "audio", "document", "file", "input_audio", "input_file", "input_video", "video", "video_url",
}  # fmt: skip
_KINDS: Final[dict[type, str]] = {str: "a string", list: "an array", dict: "an object"}
_TOO_DEEP: Final = "The body is nested too deeply."
_SPACE: Final = b" \t\r\n"

# Faults of a body, as reported to its sender.
NOT_JSON: Final = "The body is not well-formed JSON in UTF-8."
SPELT: Final = "A significant name is spelled with capitals or with look-alike letters."
NOT_AS_ENCODED: Final = "The body does not match its Content-Encoding."
ENDS_ELSEWHERE: Final = "The body is longer or shorter than its compressed content."


@mypyc_attr(acyclic=True)
class TokenBound:
    """The token bounds of one request.

    `prompt_bound`: the bound of its prompt. `maximum`: its maximum of output tokens; None if it sets none.
    `least`, `most`: the tokens to reserve. `body`: the body to forward instead of the client's; None if that is
    unchanged, or once it is taken.
    `hides_usage`: the client did not request the usage that the upstream will report.
    """

    __slots__ = ("body", "hides_usage", "least", "maximum", "most", "prompt_bound", "streams")

    def __init__(
        self, prompt_bound: int, maximum: int | None, *,
        streams: bool = False, hides_usage: bool = False, body: bytes | None = None,
    ) -> None:  # fmt: skip
        self.least: Final = max(1, prompt_bound + (1 if maximum is None else maximum))
        self.most: Final = max(self.least, prompt_bound + OUTPUT_DEFAULT) if maximum is None else self.least
        self.prompt_bound: Final = prompt_bound
        self.maximum: Final = maximum
        self.streams: Final = streams
        self.hides_usage: Final = hides_usage
        self.body = body


def bound_of(kind: str, head: RequestHead, body: bytes) -> TokenBound | None:
    """Return the token bounds of a request with this complete body; None: it is long, so `body_reading` must scan it.

    `kind`: the API of the route's upstream: "openai", "anthropic", or "header" for any other.
    Raises a Refusal (REQUEST_MALFORMED).
    """
    if len(body) > PARSED_BYTES_MAX:
        return None
    fields = head.fields
    bits = compression_of(head, body) if fields.codings else None
    content = body if bits is None else _inflated(body, bits)
    if len(content) > PARSED_BYTES_MAX:
        return None
    # Many servers parse JSON regardless of the Content-Type.
    if not fields.is_json and not content.lstrip(_SPACE).startswith(b"{"):
        return unread(kind, head, len(content), is_blank=not content.strip(_SPACE))
    try:
        document = _loads(content)
    except ValueError as error:
        is_blank = not content.strip(_SPACE)
        if fields.is_json and not is_blank:
            raise _broken(content, head, error) from error
        return unread(kind, head, len(content), is_blank=is_blank)
    if not isinstance(document, dict):
        return unread(kind, head, len(content), is_blank=False)
    has_escapes = _BACKSLASH in content and content.find(_ESCAPE) >= 0
    outline = outline_of(document)
    _check_names(content, outline, document, has_escapes=has_escapes)
    maximum = maximum_of(document, outline, head.line.path, _prompts(document) if outline.has_prompt else 1)
    prompt_bound = _prompt_bound(kind, content, document, outline, has_escapes=has_escapes)
    streams = outline.has_stream and document["stream"] is True
    if kind != "openai" or not streams or not lacks_usage(document):
        return TokenBound(prompt_bound, maximum, streams=streams)
    try:
        new = with_usage(content, has_options="stream_options" in document)
    except RecursionError as too_deep:  # another name: the compiled build gives a name one type
        raise malformed(_TOO_DEEP) from too_deep
    body = new if bits is None else _deflated(new, bits)
    return TokenBound(prompt_bound, maximum, streams=True, hides_usage=True, body=body)


def unread(kind: str, head: RequestHead, content_bytes: int, *, is_blank: bool) -> TokenBound:
    """The bounds of content without an output maximum. The content of a tunnel is not read."""
    if not is_blank:
        return TokenBound(content_bytes, None)
    return TokenBound(0, None if kind == "header" or head.fields.opens_tunnel else 0)


def maximum_of(document: Mapping[str, Any], outline: Outline, path: bytes, prompts: int) -> int | None:
    """Return the output maximum that the request sets, or None. `prompts`: the number of its prompts.

    Raises a Refusal for a maximum that is no whole number.
    """
    most = -1
    for name in outline.maximums:
        # The upstream decides which of several applies: the largest is an upper bound.
        most = max(most, _count(document, name, otherwise=-1))
    times = prompts
    for multiplier in outline.times:
        times = max(times, prompts * _count(document, multiplier, otherwise=1))
    if most < 0:
        return 0 if path.endswith(b"/embeddings") else None
    return min(most * times, _MAXIMUM_MAX)


def _prompts(document: Mapping[str, Any]) -> int:
    """Return the number of prompts to complete; a list of numbers is one prompt."""
    prompts = document["prompt"]
    return len(prompts) if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list) else 1


def _count(document: Mapping[str, Any], name: str, *, otherwise: int) -> int:
    """A whole number; `otherwise` if it is null."""
    value = document[name]
    if value is None:
        return otherwise
    if not is_count(value):
        raise malformed(f"'{name}' {_fault(value)}; it must be a whole number from 0 to {TOKENS_MAX}.", name)
    count: int = value
    return count


def _fault(value: object) -> str:
    """Describe why a value is not a number of tokens, without repeating the value."""
    if isinstance(value, bool):
        return "is a boolean"
    if isinstance(value, int | float):
        if value < 0:
            return "is negative"
        # A whole number that does not fit into 64 bits is read as a float.
        return "is too large" if value > TOKENS_MAX else "has a fraction or an exponent"
    return f"is {_KINDS.get(type(value), 'of another type')}"


def _prompt_bound(
    kind: str, content: bytes, document: dict[str, Any], outline: Outline, *, has_escapes: bool
) -> int:  # fmt: skip
    bound = len(content)
    bound += tools_tokens(kind, document)
    may_have_parts = has_escapes or outline.has_type or (not outline.is_flat and content.find(b'"type"') >= 0)
    if not may_have_parts:
        return bound
    left: list[object] = [document]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            part = value.get("type")
            if isinstance(part, str) and part in MEDIA:
                bound += MEDIA_TOKENS - (_image_bytes(value) if part in IMAGES else 0)
            left += value.values()
        elif isinstance(value, list):
            left += value
    return bound


def tools_tokens(kind: str, document: Mapping[str, Any]) -> int:
    """The tokens that the upstream adds to a prompt with tools."""
    return TOOLS_TOKENS if kind == "anthropic" and document.get("tools") else 0


def _image_bytes(part: Mapping[str, Any]) -> int:
    """The length of an image that is sent along, where its API has it."""
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if isinstance(url, str) and url.startswith("data:image/"):
        return len(url)
    source = part.get("source")
    if isinstance(source, dict) and source.get("type") == "base64" and isinstance(source.get("data"), str):
        return len(source["data"])
    return 0


def lacks_usage(document: Mapping[str, Any]) -> bool:
    """Whether the request is for a stream of chat completions or completions that will not end with its usage."""
    is_prompt = isinstance(document.get("prompt"), str | list) and "input" not in document
    if "messages" not in document and not is_prompt:
        return False
    options = document.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise malformed(f"'stream_options' {_fault(options)}; it must be an object.", "stream_options")
    return options is None or options.get("include_usage") is not True


def _check_names(content: bytes, outline: Outline, document: Mapping[str, Any], *, has_escapes: bool) -> None:
    """Refuse content that two parsers could read differently."""
    spelt, is_ambiguous = outline.spelt, outline.is_ambiguous
    if outline.has_options and isinstance(options := document["stream_options"], dict):
        inner = outline_of(options)
        spelt, is_ambiguous = spelt + inner.spelt, is_ambiguous or inner.is_ambiguous
    if is_ambiguous:
        raise malformed(SPELT)
    for name in spelt:
        has_escapes = has_escapes or content.count(name) > 1
    if has_escapes:
        _check_for_doubles(content)


def _check_for_doubles(content: bytes) -> None:
    """Check each member for duplicates. Most duplicates are in insignificant places."""
    try:
        document = json.loads(content, object_pairs_hook=_Members)
    except (ValueError, RecursionError) as error:
        raise malformed(_TOO_DEEP) from error
    for members in (document, *(value for name, value in document.pairs if name == "stream_options")):
        if isinstance(members, _Members):
            found = [name for name, _ in members.pairs if name in DECISIVE]
            if len(set(found)) != len(found):
                raise doubled(next(name for name in found if found.count(name) > 1))


class _Members:
    """A JSON object as written, with its duplicate names."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def outline_scanner() -> OutlineScanner:
    """A scanner for the members that this module uses."""
    return OutlineScanner(matters, expanded="stream_options", counted="prompt", media=MEDIA, images=IMAGES)


def compression_of(head: RequestHead, body: bytes) -> int | None:
    """zlib's name for the format of this body, not empty if it has one; None: it is not compressed."""
    encodings = [coding for coding in head.fields.codings if coding != b"identity"]
    if not encodings or not body:
        return None
    if len(encodings) > 1 or encodings[0] not in (b"gzip", b"x-gzip", b"deflate"):
        raise malformed("Content-Encoding must be identity, gzip or deflate on this route.")
    return window_bits(body, is_gzip=encodings[0] != b"deflate")


def _inflated(body: bytes, bits: int) -> bytes:
    """The content, or the beginning of it if that is long."""
    inflate = zlib.decompressobj(wbits=bits)
    try:
        content = inflate.decompress(body, PARSED_BYTES_MAX + 1)
    except zlib.error as error:
        raise malformed(NOT_AS_ENCODED) from error
    if len(content) <= PARSED_BYTES_MAX and (not inflate.eof or inflate.unused_data):
        raise malformed(ENDS_ELSEWHERE)
    return content


def _deflated(content: bytes, bits: int) -> bytes:
    deflate = zlib.compressobj(level=1, wbits=bits)
    return deflate.compress(content) + deflate.flush()


def _broken(content: bytes, head: RequestHead, error: ValueError) -> Refusal:
    """Build the refusal of content that orjson rejects. A number beyond a double's range may be a maximum."""
    scanner = outline_scanner()
    try:
        if len(content) <= PIECE_BYTES:
            scanner.feed(content)
            scanner.finish()
            if scanner.document is not None:
                maximum_of(scanner.document, outline_of(scanner.document), head.line.path, 1)
    except JsonError:
        pass
    except Refusal as refusal:
        return refusal
    return malformed(f"{NOT_JSON[:-1]}: it ends early or is invalid at character {getattr(error, 'pos', 0)}.")


def malformed(message: str, field: str | None = None) -> Refusal:
    """Build the refusal of a body, with a complete message. `field`: the member at fault."""
    return Refusal(Reason.REQUEST_MALFORMED, message, caller_text=message, replaces_sentence=True, field=field)


def doubled(name: str) -> Refusal:
    """Build the refusal of a body with a duplicate name, of which readers take the first or the last."""
    return malformed(f"'{name}' appears twice.", name)
