"""Google's Gemini API, also as Vertex AI serves it. Its JSON is Protocol Buffers': members may be in snake_case too."""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.dialects.endpoint import (
    EACH,
    Dialect,
    DialectEndpoint,
    EndpointClass,
    FinishMarker,
    StreamFormat,
    StreamSwitch,
    UsageFields,
    ending_in,
)

_USAGE: Final = UsageFields(
    places=(("usageMetadata",),),
    inputs=(("promptTokenCount",), ("toolUsePromptTokenCount",)),
    outputs=(("candidatesTokenCount",), ("thoughtsTokenCount",)),
    cached=("cachedContentTokenCount",),
    reasoning=("thoughtsTokenCount",),
    total=("totalTokenCount",),
)
_READ_USAGE: Final = UsageFields(places=(("usageMetadata",),), inputs=(("promptTokenCount",),))
_TEXT: Final = frozenset({"text", "code", "output"})
_FINISH: Final = FinishMarker(member=("candidates", EACH, "finishReason"))
#: It bounds thoughts and candidates together. Sources: docs/token-estimates.md.
_MAXIMUMS: Final = (("generationConfig", "maxOutputTokens"),)
_MULTIPLIERS: Final = (("generationConfig", "candidateCount"),)

GEMINI: Final = Dialect(
    name="gemini",
    endpoints=(
        DialectEndpoint(
            name=":generateContent",
            kind=EndpointClass.GENERATES,
            pattern=ending_in(rb"/[^/:]+:generateContent"),
            maximums=_MAXIMUMS,
            multipliers=_MULTIPLIERS,
            usage=(_USAGE,),
            finish=_FINISH,
            text_members=_TEXT,
        ),
        DialectEndpoint(
            name=":streamGenerateContent",
            kind=EndpointClass.GENERATES,
            pattern=ending_in(rb"/[^/:]+:streamGenerateContent"),
            maximums=_MAXIMUMS,
            multipliers=_MULTIPLIERS,
            usage=(_USAGE,),
            streams=StreamSwitch.PATH,
            formats=(StreamFormat.SSE, StreamFormat.JSON_ARRAY),
            finish=_FINISH,
            text_members=_TEXT,
        ),
        DialectEndpoint(
            name=":countTokens",
            kind=EndpointClass.READS,
            pattern=ending_in(rb"/[^/:]+:countTokens"),
            usage=(UsageFields(places=((),), inputs=(("totalTokens",),)),),
        ),
        DialectEndpoint(
            name=":embedContent",
            kind=EndpointClass.READS,
            pattern=ending_in(rb"/[^/:]+:(?:embedContent|batchEmbedContents)"),
            usage=(_READ_USAGE,),
        ),
    ),
    usual=DialectEndpoint(
        name="",
        kind=EndpointClass.UNKNOWN,
        maximums=_MAXIMUMS,
        multipliers=_MULTIPLIERS,
        usage=(_USAGE,),
        formats=(StreamFormat.SSE, StreamFormat.JSON_ARRAY),
        finish=_FINISH,
        text_members=_TEXT,
    ),
    model_member=False,
    model_paths=(re.compile(rb"(?is).*/([^/:]+):[a-z]+\Z"),),
    thinking=(("generationConfig", "thinkingConfig", "thinkingBudget"),),
    has_twins=True,
    response_models=(("modelVersion",),),
    image_tokens=1_300,
    low_detail_image_tokens=1_300,
)
