"""What a request may use: an upper bound of its prompt's tokens, and the most that it lets the model put out.

The prompt's bound is the length of the request. A token of a byte-level vocabulary is a byte of text or more; JSON only
makes text longer; and what a chat template puts around a message is less than the JSON around it. What is not text has
bounds of its own, below. What the upstream adds from elsewhere (an earlier response, a stored prompt, a file named by
its id, what a tool of its own finds) cannot be seen here: it is known when the answer reports it.

A request is only worth what its upstream reads in it. So a body that two parsers could read differently where it
matters (a maximum given twice, or spelt with capitals, which some match) is refused, and so is a maximum that is no
whole number. The prompt is looked at for its length and is kept nowhere.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, Final

import orjson

from keyproxy.compiling import mypyc_attr
from keyproxy.limits.allowance import TokenNeed
from keyproxy.model import RequestHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.tokens.inflate import window_bits
from keyproxy.tokens.report import TOKENS_MAX, is_count
from keyproxy.tokens.rewrite import with_usage

#: An image, a sound or a document, over and above its bytes; an image that is sent along counts without its bytes.
#: OpenAI's and Anthropic's current models see at most 1,445 and 4,784 tokens in an image (gpt-4o-mini: 48,169).
MEDIA_TOKENS: Final = 5_000

#: What Anthropic puts before a prompt with tools: 264 to 804 tokens by its documentation.
TOOLS_TOKENS: Final = 1_000

#: Said here the compiled build need not look for it.
_loads: Final = orjson.loads

#: Larger products are told as this: no budget has so many.
_MAXIMUM_MAX: Final = 10**15

_MAXIMUMS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_TIMES: Final = ("n", "best_of")
#: Names that a request may have once, in this spelling only.
_DECISIVE: Final = frozenset({*_MAXIMUMS, *_TIMES, "stream", "stream_options", "include_usage", "prompt"})
#: With it a name may be spelt in another way. A byte is found at once; sought with `in`, several take three times as long
#: as with `find`, since they are tried as a number first.
_ESCAPE: Final = b"\\u"
_BACKSLASH: Final = 0x5C
#: Java's equalsIgnoreCase takes the Turkish i, with a dot or without, in capitals or not, for the Latin one.
_DOT_ABOVE: Final = "\u0307"

_IMAGES: Final = frozenset({"image", "image_url", "input_image"})
_MEDIA: Final = _IMAGES | {
    "audio", "document", "file", "input_audio", "input_file", "input_video", "video", "video_url",
}  # fmt: skip
_TOO_DEEP: Final = "The body is nested too deeply."
_SPACE: Final = b" \t\r\n"


@mypyc_attr(acyclic=True)
class TokenAsk(TokenNeed):
    """What one request may use.

    `prompt_bound`: of its prompt. `maximum`: the most tokens it lets the model put out; None if it does not say.
    `body`: what goes upstream instead of the client's body, None if that goes as it came. `hides_usage`: the client did
    not ask for the usage that will come.
    """

    __slots__ = ("body", "hides_usage", "maximum", "prompt_bound", "streams")

    def __init__(
        self, prompt_bound: int, maximum: int | None, *,
        streams: bool = False, hides_usage: bool = False, body: bytes | None = None,
    ) -> None:  # fmt: skip
        if maximum is None:
            super().__init__(prompt_bound + 1, None)
        else:
            super().__init__(prompt_bound, prompt_bound + maximum)
        self.prompt_bound: Final = prompt_bound
        self.maximum: Final = maximum
        self.streams: Final = streams
        self.hides_usage: Final = hides_usage
        self.body: Final = body


def ask_of(kind: str, head: RequestHead, body: bytes, *, bytes_max: int) -> TokenAsk:
    """What a request with this whole body asks for.

    `kind`: what the route's upstream speaks, "openai", "anthropic", or "header" for anything. `bytes_max`: what a
    compressed body may grow to. Raises a Refusal (REQUEST_MALFORMED, BODY_TOO_LARGE).
    """
    fields = head.fields
    bits = _format([coding for coding in fields.codings if coding != b"identity"], body) if fields.codings else None
    content = body if bits is None else _inflated(body, bits, bytes_max)
    # Many a server reads JSON whatever it is called.
    if not fields.is_json and not content.lstrip(_SPACE).startswith(b"{"):
        return _unread(kind, content, opens_tunnel=fields.opens_tunnel)
    try:
        document = _loads(content)
    except ValueError as error:
        if fields.is_json and content.strip(_SPACE):
            raise _malformed("The body is not well-formed JSON in UTF-8.") from error
        return _unread(kind, content, opens_tunnel=fields.opens_tunnel)
    if not isinstance(document, dict):
        return _unread(kind, content, opens_tunnel=fields.opens_tunnel)
    has_escapes = _BACKSLASH in content and content.find(_ESCAPE) >= 0
    outline = _outline(document)
    _check_names(content, outline, document, has_escapes=has_escapes)
    maximum = _maximum(document, outline, head.line.path)
    prompt_bound = _prompt_bound(kind, content, document, outline, has_escapes=has_escapes)
    streams = outline.has_stream and document["stream"] is True
    if kind != "openai" or not streams or not _lacks_usage(document):
        return TokenAsk(prompt_bound, maximum, streams=streams)
    try:
        new = with_usage(content, has_options="stream_options" in document)
    except RecursionError as error:
        raise _malformed(_TOO_DEEP) from error
    body = new if bits is None else _deflated(new, bits)
    return TokenAsk(prompt_bound, maximum, streams=True, hides_usage=True, body=body)


def _unread(kind: str, content: bytes, *, opens_tunnel: bool) -> TokenAsk:
    """For content that says nothing of what may be put out. Nobody reads what is asked for, and used, in a tunnel."""
    if content.strip(_SPACE):
        return TokenAsk(len(content), None)
    return TokenAsk(0, None if kind == "header" or opens_tunnel else 0)


class _Outline:
    """What there is to know of a request's members, whatever their values."""

    __slots__ = (
        "has_options", "has_prompt", "has_stream", "has_type", "is_ambiguous", "is_flat", "maximums", "spelt", "times",
    )  # fmt: skip

    def __init__(self, found: int) -> None:
        """`found`: bits of _BITS, _AMBIGUOUS and _NESTED."""
        there = [name for name, bit in _BITS.items() if found & bit]
        self.maximums: Final = tuple([name for name in _MAXIMUMS if name in there])
        self.times: Final = tuple([name for name in _TIMES if name in there])
        self.has_stream: Final = "stream" in there
        self.has_options: Final = "stream_options" in there
        self.has_prompt: Final = "prompt" in there
        self.has_type: Final = "type" in there
        #: How those that matter stand in the body, if no other spelling does.
        self.spelt: Final = tuple([f'"{name}"'.encode() for name in there if name in _DECISIVE])
        self.is_ambiguous: Final = bool(found & _AMBIGUOUS)
        self.is_flat: Final = not found & _NESTED


#: A bit for each name that means something here, one for all that some readers take for one that counts, and one for
#: values that have members of their own.
_BITS: Final[dict[str, int]] = {name: 1 << place for place, name in enumerate(sorted({*_DECISIVE, "type"}))}
_AMBIGUOUS: Final = 1 << len(_BITS)
_NESTED: Final = 2 << len(_BITS)

#: What each name means of those that were met: requests of one API have the same few. Full: all are forgotten.
_met: Final[dict[str, int]] = {}
_MET_MAX: Final = 4_096
_MET_CHARACTERS_MAX: Final = 64
#: By the bits of all members together.
_outlines: Final[dict[int, _Outline]] = {}


def _outline(document: dict[str, Any]) -> _Outline:
    found = 0
    for name, value in document.items():
        bits = _met.get(name)
        found |= _meet(name) if bits is None else bits
        # One by one: the compiled build sees at once whether it is one, but makes a union anew each time.
        if isinstance(value, dict) or isinstance(value, list):  # noqa: SIM101
            found |= _NESTED
    outline = _outlines.get(found)
    if outline is None:
        outline = _outlines[found] = _Outline(found)
    return outline


def _meet(name: str) -> int:
    bits = _BITS.get(name, _AMBIGUOUS if _is_ambiguous(name) else 0)
    if len(name) <= _MET_CHARACTERS_MAX:
        if len(_met) >= _MET_MAX:
            _met.clear()
        _met[name] = bits
    return bits


def _is_ambiguous(name: str) -> bool:
    """Whether some readers take it for a name that counts, and others do not."""
    return name not in _DECISIVE and name.upper().casefold().replace(_DOT_ABOVE, "") in _DECISIVE


def _maximum(document: dict[str, Any], outline: _Outline, path: bytes) -> int | None:
    most = -1
    for name in outline.maximums:
        # Which of several counts is the upstream's to say: the largest is an upper bound.
        most = max(most, _count(document, name, otherwise=-1))
    times = 1
    for multiplier in outline.times:
        times = max(times, _count(document, multiplier, otherwise=1))
    if most < 0:
        return 0 if path.endswith(b"/embeddings") else None
    if outline.has_prompt:
        prompts = document["prompt"]
        if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
            times *= len(prompts)  # each is completed; a list of numbers is one prompt
    return min(most * times, _MAXIMUM_MAX)


def _count(document: dict[str, Any], name: str, *, otherwise: int) -> int:
    """A whole number; `otherwise` if it is null."""
    value = document[name]
    if value is None:
        return otherwise
    if not is_count(value):
        raise _malformed(f"{name!r} is not a whole number from 0 to {TOKENS_MAX}.")
    count: int = value
    return count


def _prompt_bound(
    kind: str, content: bytes, document: dict[str, Any], outline: _Outline, *, has_escapes: bool
) -> int:  # fmt: skip
    bound = len(content)
    if kind == "anthropic" and document.get("tools"):
        bound += TOOLS_TOKENS
    may_have_parts = has_escapes or outline.has_type or (not outline.is_flat and content.find(b'"type"') >= 0)
    if not may_have_parts:
        return bound
    left: list[object] = [document]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            part = value.get("type")
            if isinstance(part, str) and part in _MEDIA:
                bound += MEDIA_TOKENS - (_image_bytes(value) if part in _IMAGES else 0)
            left += value.values()
        elif isinstance(value, list):
            left += value
    return bound


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


def _lacks_usage(document: Mapping[str, Any]) -> bool:
    """Whether this asks for a stream of chat completions or completions that will not end with its usage."""
    is_prompt = isinstance(document.get("prompt"), str | list) and "input" not in document
    if "messages" not in document and not is_prompt:
        return False
    options = document.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _malformed("'stream_options' is not an object.")
    return options is None or options.get("include_usage") is not True


def _check_names(content: bytes, outline: _Outline, document: Mapping[str, Any], *, has_escapes: bool) -> None:
    """Refuse what two readers could read differently."""
    spelt, is_ambiguous = outline.spelt, outline.is_ambiguous
    if outline.has_options and isinstance(options := document["stream_options"], dict):
        inner = _outline(options)
        spelt, is_ambiguous = spelt + inner.spelt, is_ambiguous or inner.is_ambiguous
    if is_ambiguous:
        raise _malformed("A name that counts is spelt with capitals.")
    for name in spelt:
        has_escapes = has_escapes or content.count(name) > 1
    if has_escapes:
        _check_for_doubles(content)


def _check_for_doubles(content: bytes) -> None:
    """The same, looking at each member. Most that is there twice is so in a place that does not matter."""
    try:
        document = json.loads(content, object_pairs_hook=_Members)
    except (ValueError, RecursionError) as error:
        raise _malformed(_TOO_DEEP) from error
    for members in (document, *(value for name, value in document.pairs if name == "stream_options")):
        if isinstance(members, _Members):
            found = [name for name, _ in members.pairs if name in _DECISIVE]
            if len(set(found)) != len(found):
                raise _malformed("A name that counts is there twice.")


class _Members:
    """A JSON object as it stands, with what is there twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _format(encodings: list[bytes], body: bytes) -> int | None:
    if not encodings or not body:
        return None
    if len(encodings) > 1 or encodings[0] not in (b"gzip", b"x-gzip", b"deflate"):
        raise _malformed("Content-Encoding must be identity, gzip or deflate on this route.")
    return window_bits(body, is_gzip=encodings[0] != b"deflate")


def _inflated(body: bytes, bits: int, bytes_max: int) -> bytes:
    inflate = zlib.decompressobj(wbits=bits)
    try:
        content = inflate.decompress(body, bytes_max + 1)
    except zlib.error as error:
        raise _malformed("The body is not what its Content-Encoding says.") from error
    if len(content) > bytes_max:
        raise Refusal(Reason.BODY_TOO_LARGE, f"inflates to more than {bytes_max} bytes")
    if not inflate.eof or inflate.unused_data:
        raise _malformed("The body does not end where its Content-Encoding does.")
    return content


def _deflated(content: bytes, bits: int) -> bytes:
    deflate = zlib.compressobj(level=1, wbits=bits)
    return deflate.compress(content) + deflate.flush()


def _malformed(said: str) -> Refusal:
    return Refusal(Reason.REQUEST_MALFORMED, said, said=said)
