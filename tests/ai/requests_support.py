"""Read a request body as the gateway does."""

from __future__ import annotations

import json
from typing import Any

from keyproxy.ai.dialects.endpoint import DialectEndpoint
from keyproxy.ai.dialects.table import DIALECTS, endpoint_of
from keyproxy.ai.requests.request_facts import RequestFacts
from keyproxy.ai.requests.request_reading import BodyBounds, ReadingRules, RequestReading
from keyproxy.http_messages import RequestFields

HELLO: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello, how are you?"}]}

PATHS = {
    "openai": b"/v1/chat/completions",
    "anthropic": b"/v1/messages",
    "gemini": b"/v1beta/models/gemini-2.5-flash:generateContent",
    "ollama": b"/api/chat",
    "bedrock": b"/model/amazon.nova-lite-v1%3A0/converse",
    "header": b"/v1/jobs",
}

JSON = b"application/json"


def fields(media_type: bytes = JSON, codings: tuple[bytes, ...] = ()) -> RequestFields:
    return RequestFields(host=b"h", host_block=b"", media_type=media_type, codings=codings)


def endpoint(dialect: str = "openai", path: bytes | None = None) -> DialectEndpoint:
    return endpoint_of(DIALECTS[dialect], b"POST", PATHS[dialect] if path is None else path)


def reading(
    body: bytes | dict[str, Any], dialect: str = "openai", path: bytes | None = None, *,
    given: RequestFields | None = None, bounds: BodyBounds | None = None, model_member: str | None = None,
) -> RequestReading:  # fmt: skip
    """A reading that is complete."""
    rules = ReadingRules(DIALECTS[dialect], bounds or BodyBounds(), model_member=model_member)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = RequestReading(rules, endpoint(dialect, path), given or fields(), raw)
    while not found.advance():
        pass
    return found


def facts(
    body: bytes | dict[str, Any], dialect: str = "openai", path: bytes | None = None, **options: Any
) -> RequestFacts:
    found = reading(body, dialect, path, **options).facts
    assert found is not None
    return found
