"""The columns of the table of dialects: what one endpoint of an API accepts and reports."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

#: The names of nested members of a JSON document, outermost first. `EACH` stands for every element of an array.
MemberPath = tuple[str, ...]

EACH: Final = "*"

#: The endpoint of a tunnel, of an unlisted path or of a method other than POST has no pattern.
_NEVER: Final = re.compile(rb"(?!)")


class EndpointClass(enum.Enum):
    """How an endpoint uses tokens.

    GENERATES: produces text up to a maximum. MEDIA: produces, without a maximum. READS: uses input only. NONE: uses no
    tokens. UNKNOWN: any other path.
    """

    GENERATES = "generates"
    MEDIA = "media"
    READS = "reads"
    NONE = "none"
    UNKNOWN = "unknown"


class StreamSwitch(enum.Enum):
    """What makes a response a stream. A member named `stream` that is true; that is true or absent; the path."""

    NEVER = "never"
    MEMBER = "member"
    MEMBER_UNLESS_FALSE = "member unless false"
    PATH = "path"


class StreamFormat(enum.Enum):
    """The framing of a stream's events."""

    SSE = "text/event-stream"
    NDJSON = "application/x-ndjson"
    JSON_ARRAY = "application/json"
    AWS_EVENT_STREAM = "application/vnd.amazon.eventstream"


@dataclass(frozen=True, slots=True, eq=False)
class UsageFields:
    """Where a response reports its usage.

    `places`: the paths of the object with the counts, in a complete body and in the events of a stream; `()` is the
    document itself. The other paths are relative to that object. The first of `inputs` and of `outputs` is required,
    others are added where present. `cached`, `cache_write` and `reasoning` are parts of the input, the input and the
    output. `total`: the sum of all; what is in none of its parts (hidden reasoning, for some servers) is output, and with
    it the first of `inputs` and of `outputs` may be absent. `events`: the types of stream events that report; none: any
    event with the object. `cumulative_event`: the type of an event whose counts replace earlier ones, member by member.
    `no_report_types`: values of the object's `type` that make it no report.
    """

    places: tuple[MemberPath, ...]
    inputs: tuple[MemberPath, ...]
    outputs: tuple[MemberPath, ...] = ()
    cached: MemberPath | None = None
    cache_write: MemberPath | None = None
    reasoning: MemberPath | None = None
    total: MemberPath | None = None
    events: tuple[str, ...] = ()
    cumulative_event: str = ""
    no_report_types: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class FinishMarker:
    """How a stream shows that the model has finished, before the usage arrives.

    `event`: the type of an event. `begins`: the type of the event that opens what the former closes; the model has
    finished when none is open. Otherwise `member` is the path of a value that is neither null nor false; with `EACH`
    in the path, it must have occurred for every choice.
    """

    event: str = ""
    begins: str = ""
    member: MemberPath = ()


@dataclass(frozen=True, slots=True, eq=False)
class Endpoint:
    """One row of the table.

    `maximums`: the members that limit the output; the first is the one to insert. `multipliers`: members that multiply
    the output; of several, the largest applies. `prompts`: the member with several prompts to complete, which multiply
    as well. `usage`: alternatives, in order. `text_members`: the names of members of stream events with model output.
    `adds_include_usage`: a stream reports usage only if `stream_options.include_usage` requests it.
    """

    name: str
    kind: EndpointClass
    pattern: re.Pattern[bytes] = _NEVER
    maximums: tuple[MemberPath, ...] = ()
    multipliers: tuple[MemberPath, ...] = ()
    prompts: str = ""
    usage: tuple[UsageFields, ...] = ()
    streams: StreamSwitch = StreamSwitch.NEVER
    formats: tuple[StreamFormat, ...] = ()
    finish: FinishMarker | None = None
    text_members: frozenset[str] = frozenset()
    adds_include_usage: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """One API. `usual`: the row of every other path, with the members that the API's endpoints share.

    `model_member`: the request names its model in the JSON member `model`. `model_paths`: patterns with the model in
    their first group, for a path as sent; the group is percent-encoded. `response_models`: where a response, or an
    event of a stream, names its model.
    `thinking`: where a request states how many tokens the model may reason with. `has_twins`: members may be spelled in
    snake_case too. `has_image_arrays`: arrays named `images` contain images in
    base64.
    `image_tokens`, `low_detail_image_tokens`: the input estimate of an image. `tools_member`, `tools_tokens`: if the
    request has this member, the provider adds a prompt of about so many tokens.
    """

    name: str
    endpoints: tuple[Endpoint, ...]
    usual: Endpoint
    model_member: bool = True
    model_paths: tuple[re.Pattern[bytes], ...] = ()
    response_models: tuple[MemberPath, ...] = ()
    thinking: tuple[MemberPath, ...] = ()
    has_twins: bool = False
    has_image_arrays: bool = False
    image_tokens: int = 4_800
    low_detail_image_tokens: int = 4_800
    tools_member: str = ""
    tools_tokens: int = 0

    @property
    def streams_by_member(self) -> bool:
        """Whether requests select a stream with the member `stream`."""
        return self.usual.streams in (StreamSwitch.MEMBER, StreamSwitch.MEMBER_UNLESS_FALSE)


def ending_in(pattern: bytes) -> re.Pattern[bytes]:
    """A pattern for the end of a path. Some servers ignore case, so the pattern does too."""
    return re.compile(rb"(?is).*" + pattern + rb"\Z")
