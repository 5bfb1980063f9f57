"""Ollama's own API. It streams NDJSON unless `stream` is false."""

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

_USAGE: Final = UsageFields(places=((),), inputs=(("prompt_eval_count",),), outputs=(("eval_count",),))
_TEXT: Final = frozenset({"content", "response", "thinking"})
_FINISH: Final = FinishMarker(member=("done",))

OLLAMA: Final = Dialect(
    name="ollama",
    endpoints=(
        Endpoint(
            name="/api/chat",
            kind=EndpointClass.GENERATES,
            pattern=ending_in(rb"/api/chat"),
            maximums=(("options", "num_predict"),),
            usage=(_USAGE,),
            streams=StreamSwitch.MEMBER_UNLESS_FALSE,
            formats=(StreamFormat.NDJSON,),
            finish=_FINISH,
            text_members=_TEXT,
        ),
        Endpoint(
            name="/api/generate",
            kind=EndpointClass.GENERATES,
            pattern=ending_in(rb"/api/generate"),
            maximums=(("options", "num_predict"),),
            usage=(_USAGE,),
            streams=StreamSwitch.MEMBER_UNLESS_FALSE,
            formats=(StreamFormat.NDJSON,),
            finish=_FINISH,
            text_members=_TEXT,
        ),
        Endpoint(
            name="/api/embed",
            kind=EndpointClass.READS,
            pattern=ending_in(rb"/api/(?:embed|embeddings)"),
            usage=(UsageFields(places=((),), inputs=(("prompt_eval_count",),)),),
        ),
    ),
    usual=Endpoint(
        name="",
        kind=EndpointClass.UNKNOWN,
        maximums=(("options", "num_predict"),),
        usage=(_USAGE,),
        streams=StreamSwitch.MEMBER_UNLESS_FALSE,
        formats=(StreamFormat.NDJSON,),
        finish=_FINISH,
        text_members=_TEXT,
    ),
    has_image_arrays=True,
    response_models=(("model",),),
)
