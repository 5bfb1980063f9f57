"""OpenAI's API: chat completions, completions, responses, embeddings, moderations, audio and images.

Azure and most open-source servers implement it too.
"""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.dialects.endpoint import (
    EACH,
    Dialect,
    Endpoint,
    EndpointClass,
    FinishMarker,
    StreamFormat,
    StreamSwitch,
    UsageFields,
    ending_in,
)

_SSE: Final = (StreamFormat.SSE,)

_COMPLETION_USAGE: Final = UsageFields(
    places=(("usage",),),
    inputs=(("prompt_tokens",),),
    outputs=(("completion_tokens",),),
    cached=("prompt_tokens_details", "cached_tokens"),
    cache_write=("prompt_tokens_details", "cache_write_tokens"),
    reasoning=("completion_tokens_details", "reasoning_tokens"),
    total=("total_tokens",),
)
_RESPONSE_USAGE: Final = UsageFields(
    places=(("usage",), ("response", "usage")),
    inputs=(("input_tokens",),),
    outputs=(("output_tokens",),),
    cached=("input_tokens_details", "cached_tokens"),
    cache_write=("input_tokens_details", "cache_write_tokens"),
    reasoning=("output_tokens_details", "reasoning_tokens"),
    total=("total_tokens",),
    events=("response.completed", "response.incomplete", "response.failed"),
)
#: A transcription is billed by tokens or by its duration; the latter is an object of type `duration`.
_MEDIA_USAGE: Final = UsageFields(
    places=(("usage",),),
    inputs=(("input_tokens",),),
    outputs=(("output_tokens",),),
    no_report_types=("duration",),
)
_READ_USAGE: Final = UsageFields(places=(("usage",),), inputs=(("prompt_tokens",),))

_CHAT_TEXT: Final = frozenset({"content", "reasoning_content", "reasoning", "refusal", "arguments", "text"})
_RESPONSE_TEXT: Final = frozenset({"delta"})
_CHOICES: Final = FinishMarker(member=("choices", EACH, "finish_reason"))

OPENAI: Final = Dialect(
    name="openai",
    endpoints=(
        Endpoint(
            name="/chat/completions",
            kind=EndpointClass.GENERATES,
            pattern=ending_in(rb"/chat/completions"),
            maximums=(("max_completion_tokens",), ("max_tokens",)),
            multipliers=(("n",),),
            usage=(_COMPLETION_USAGE,),
            streams=StreamSwitch.MEMBER,
            formats=_SSE,
            finish=_CHOICES,
            text_members=_CHAT_TEXT,
            adds_include_usage=True,
        ),
        Endpoint(
            name="/completions",
            kind=EndpointClass.GENERATES,
            pattern=ending_in(rb"/completions"),
            maximums=(("max_tokens",),),
            multipliers=(("n",), ("best_of",)),
            prompts="prompt",
            usage=(_COMPLETION_USAGE,),
            streams=StreamSwitch.MEMBER,
            formats=_SSE,
            finish=_CHOICES,
            text_members=_CHAT_TEXT,
            adds_include_usage=True,
        ),
        Endpoint(
            name="/responses",
            kind=EndpointClass.GENERATES,
            pattern=ending_in(rb"/responses"),
            maximums=(("max_output_tokens",),),
            usage=(_RESPONSE_USAGE,),
            streams=StreamSwitch.MEMBER,
            formats=_SSE,
            finish=FinishMarker(event="response.output_item.done", begins="response.output_item.added"),
            text_members=_RESPONSE_TEXT,
        ),
        Endpoint(
            name="/embeddings", kind=EndpointClass.READS, pattern=ending_in(rb"/embeddings"), usage=(_READ_USAGE,)
        ),
        Endpoint(
            name="/moderations", kind=EndpointClass.READS, pattern=ending_in(rb"/moderations"), usage=(_READ_USAGE,)
        ),
        Endpoint(
            name="/audio/*",
            kind=EndpointClass.MEDIA,
            pattern=ending_in(rb"/audio/[^/]+"),
            maximums=(("max_completion_tokens",), ("max_tokens",), ("max_output_tokens",)),
            usage=(_MEDIA_USAGE,),
            streams=StreamSwitch.MEMBER,
            formats=_SSE,
            text_members=_RESPONSE_TEXT,
        ),
        Endpoint(
            name="/images/*",
            kind=EndpointClass.MEDIA,
            pattern=ending_in(rb"/images/[^/]+"),
            maximums=(("max_completion_tokens",), ("max_tokens",), ("max_output_tokens",)),
            usage=(_MEDIA_USAGE,),
            streams=StreamSwitch.MEMBER,
            formats=_SSE,
        ),
    ),
    usual=Endpoint(
        name="",
        kind=EndpointClass.UNKNOWN,
        maximums=(("max_completion_tokens",), ("max_tokens",), ("max_output_tokens",)),
        multipliers=(("n",), ("best_of",)),
        prompts="prompt",
        usage=(_COMPLETION_USAGE, _RESPONSE_USAGE),
        streams=StreamSwitch.MEMBER,
        formats=_SSE,
        finish=_CHOICES,
        text_members=_CHAT_TEXT,
    ),
    # Azure: /openai/deployments/NAME/chat/completions.
    model_paths=(re.compile(rb"(?is).*/deployments/([^/]+)/"),),
    thinking=(("reasoning", "max_tokens"),),
    response_models=(("model",), ("response", "model")),
    image_tokens=1_500,
    low_detail_image_tokens=85,
)
