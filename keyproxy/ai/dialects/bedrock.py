"""Amazon Bedrock's Converse API."""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.dialects.endpoint import (
    Dialect,
    DialectEndpoint,
    EndpointClass,
    FinishMarker,
    StreamFormat,
    StreamSwitch,
    UsageFields,
    ending_in,
)

#: `inputTokens` excludes what the cache served and stored, as in Anthropic's API. Sources: docs/token-estimates.md.
_USAGE: Final = UsageFields(
    places=(("usage",),),
    inputs=(("inputTokens",), ("cacheReadInputTokens",), ("cacheWriteInputTokens",)),
    outputs=(("outputTokens",),),
    cached=("cacheReadInputTokens",),
    cache_write=("cacheWriteInputTokens",),
    events=("metadata",),
)
_TEXT: Final = frozenset({"text", "input"})
_FINISH: Final = FinishMarker(event="messageStop")
_MAXIMUMS: Final = (("inferenceConfig", "maxTokens"),)

BEDROCK: Final = Dialect(
    name="bedrock",
    endpoints=(
        DialectEndpoint(
            name="/converse",
            kind=EndpointClass.GENERATES,
            pattern=ending_in(rb"/model/[^/]+/converse"),
            maximums=_MAXIMUMS,
            usage=(_USAGE,),
            finish=_FINISH,
            text_members=_TEXT,
        ),
        DialectEndpoint(
            name="/converse-stream",
            kind=EndpointClass.GENERATES,
            pattern=ending_in(rb"/model/[^/]+/converse-stream"),
            maximums=_MAXIMUMS,
            usage=(_USAGE,),
            streams=StreamSwitch.PATH,
            formats=(StreamFormat.AWS_EVENT_STREAM,),
            finish=_FINISH,
            text_members=_TEXT,
        ),
    ),
    usual=DialectEndpoint(
        name="",
        kind=EndpointClass.UNKNOWN,
        maximums=_MAXIMUMS,
        usage=(_USAGE,),
        formats=(StreamFormat.AWS_EVENT_STREAM,),
        finish=_FINISH,
        text_members=_TEXT,
    ),
    model_member=False,
    model_paths=(re.compile(rb"(?is).*/model/([^/]+)/[^/]+\Z"),),
    thinking=(("additionalModelRequestFields", "thinking", "budget_tokens"),),
    tools_member="toolConfig",
    tools_tokens=1_000,
)
