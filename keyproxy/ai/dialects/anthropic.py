"""Anthropic's API: messages, and the counting of their tokens."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import (
    Dialect,
    Endpoint,
    EndpointClass,
    FinishMarker,
    StreamFormat,
    StreamSwitch,
    UsageFields,
    ending_in,
)

#: `input_tokens` excludes what the cache served and stored.
_USAGE: Final = UsageFields(
    places=(("usage",), ("message", "usage")),
    inputs=(("input_tokens",), ("cache_creation_input_tokens",), ("cache_read_input_tokens",)),
    outputs=(("output_tokens",),),
    cached=("cache_read_input_tokens",),
    cache_write=("cache_creation_input_tokens",),
    reasoning=("output_tokens_details", "thinking_tokens"),
    events=("message_start", "message_delta"),
    cumulative_event="message_delta",
)
_TEXT: Final = frozenset({"text", "thinking", "partial_json"})
_FINISH: Final = FinishMarker(event="content_block_stop", begins="content_block_start")

ANTHROPIC: Final = Dialect(
    name="anthropic",
    endpoints=(
        Endpoint(
            name="/messages",
            kind=EndpointClass.GENERATES,
            pattern=ending_in(rb"/messages"),
            maximums=(("max_tokens",),),
            usage=(_USAGE,),
            streams=StreamSwitch.MEMBER,
            formats=(StreamFormat.SSE,),
            finish=_FINISH,
            text_members=_TEXT,
        ),
        Endpoint(
            name="/messages/count_tokens",
            kind=EndpointClass.READS,
            pattern=ending_in(rb"/messages/count_tokens"),
            usage=(UsageFields(places=((),), inputs=(("input_tokens",),)),),
        ),
    ),
    usual=Endpoint(
        name="",
        kind=EndpointClass.UNKNOWN,
        maximums=(("max_tokens",),),
        usage=(_USAGE,),
        streams=StreamSwitch.MEMBER,
        formats=(StreamFormat.SSE,),
        finish=_FINISH,
        text_members=_TEXT,
    ),
    thinking=(("thinking", "budget_tokens"),),
    response_models=(("model",), ("message", "model")),
    tools_member="tools",
    tools_tokens=1_000,
)
