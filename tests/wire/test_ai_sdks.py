"""The vendors' SDKs, with their default retries, against an upstream of bytes through the proxy."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import anthropic
import ollama
import openai
import pytest
from google import genai
from google.genai import errors as genai_errors
from google.genai import types as genai_types

from keyproxy.config.schema import RouteRow
from tests import fakes
from tests.rawhttp import Message, Upstream
from tests.wire.conftest import KEY, Start, Wire
from tests.wire.test_ai_examples import HELLO, plan, reports
from tests.wire.test_ai_examples import MESSAGES as OPENAI_MESSAGES
from tests.wire.test_limits import STREAM, chunk

SECRET = KEY.decode()


def event(document: dict[str, Any], kind: str = "") -> bytes:
    name = f"event: {kind}\n" if kind else ""
    return chunk(f"{name}data: {json.dumps(document)}\n\n".encode())


OPENAI = reports(
    {
        "id": "c", "object": "chat.completion", "created": 1, "model": "gpt-4o",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hi"}}],
        "usage": {"prompt_tokens": 13, "completion_tokens": 9, "total_tokens": 22},
    }
)  # fmt: skip
OPENAI_CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}
OPENAI_STREAM = (
    STREAM
    + event({**OPENAI_CHUNK, "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]})
    + event({**OPENAI_CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    + event({**OPENAI_CHUNK, "choices": [], "usage": {"prompt_tokens": 13, "completion_tokens": 9, "total_tokens": 22}})
    + chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)
ANTHROPIC_MESSAGE = {
    "id": "m", "type": "message", "role": "assistant", "model": "claude-x", "stop_reason": "end_turn",
    "stop_sequence": None, "content": [{"type": "text", "text": "Hi"}], "usage": {"input_tokens": 13, "output_tokens": 9},
}  # fmt: skip
ANTHROPIC_STREAM = (
    STREAM
    + event(
        {
            "type": "message_start",
            "message": {**ANTHROPIC_MESSAGE, "content": [], "usage": {"input_tokens": 13, "output_tokens": 1}},
        },
        "message_start",
    )
    + event(
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        "content_block_start",
    )
    + event(
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
        "content_block_delta",
    )
    + event({"type": "content_block_stop", "index": 0}, "content_block_stop")
    + event(
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}}, "message_delta"
    )
    + event({"type": "message_stop"}, "message_stop")
    + b"0\r\n\r\n"
)
GEMINI_CHUNK = {
    "candidates": [{"content": {"role": "model", "parts": [{"text": "Hi"}]}, "finishReason": "STOP"}],
    "usageMetadata": {"promptTokenCount": 13, "candidatesTokenCount": 9},
}
GEMINI_STREAM = STREAM + event(GEMINI_CHUNK) + b"0\r\n\r\n"
OLLAMA_LINE = {
    "model": "llama3.2", "created_at": "2026-01-01T00:00:00Z", "done": True,
    "message": {"role": "assistant", "content": "Hi"}, "prompt_eval_count": 13, "eval_count": 9,
}  # fmt: skip
OLLAMA_STREAM = (
    STREAM.replace(b"text/event-stream", b"application/x-ndjson")
    + chunk(json.dumps(OLLAMA_LINE).encode() + b"\n")
    + b"0\r\n\r\n"
)


class Sdk(NamedTuple):
    """How an SDK asks, for a whole response and for a stream, and the exception that it raises for a refusal."""

    ask: Callable[[str, bool], str]
    refused: type[Exception]
    answer: bytes
    stream: bytes
    cap: tuple[str, ...]


def with_openai(url: str, streams: bool) -> str:
    messages: Any = OPENAI_MESSAGES
    with openai.OpenAI(api_key=SECRET, base_url=f"{url}/v1") as client:
        assert client.max_retries == openai.DEFAULT_MAX_RETRIES > 0
        if not streams:
            return client.chat.completions.create(model="gpt-4o", messages=messages).choices[0].message.content or ""
        chunks = list(client.chat.completions.create(model="gpt-4o", messages=messages, stream=True))
    assert all(one.usage is None for one in chunks)
    return "".join(one.choices[0].delta.content or "" for one in chunks)


def with_anthropic(url: str, streams: bool) -> str:
    messages: Any = OPENAI_MESSAGES
    with anthropic.Anthropic(api_key=SECRET, base_url=url) as client:
        assert client.max_retries == anthropic.DEFAULT_MAX_RETRIES > 0
        if not streams:
            message = client.messages.create(model="claude-x", max_tokens=50, messages=messages)
            return getattr(message.content[0], "text", "")
        with client.messages.stream(model="claude-x", max_tokens=50, messages=messages) as stream:
            return "".join(stream.text_stream)


def with_gemini(url: str, streams: bool) -> str:
    options = genai_types.HttpOptions(base_url=url, headers={"X-Api-Key": SECRET})
    with genai.Client(api_key="none", http_options=options) as client:
        if not streams:
            return client.models.generate_content(model="g", contents=HELLO).text or ""
        return "".join(one.text or "" for one in client.models.generate_content_stream(model="g", contents=HELLO))


def with_ollama(url: str, streams: bool) -> str:
    with ollama.Client(host=url, headers={"Authorization": f"Bearer {SECRET}"}) as client:
        if not streams:
            return client.chat(model="llama3.2", messages=OPENAI_MESSAGES).message.content or ""
        lines = client.chat(model="llama3.2", messages=OPENAI_MESSAGES, stream=True)
        return "".join(one.message.content or "" for one in lines)


SDKS = {
    "openai": Sdk(with_openai, openai.APIStatusError, OPENAI, OPENAI_STREAM, ("max_completion_tokens",)),
    "anthropic": Sdk(with_anthropic, anthropic.APIStatusError, reports(ANTHROPIC_MESSAGE), ANTHROPIC_STREAM, ()),
    "gemini": Sdk(
        with_gemini, genai_errors.APIError, reports(GEMINI_CHUNK), GEMINI_STREAM,
        ("generationConfig", "maxOutputTokens"),
    ),
    "ollama": Sdk(with_ollama, ollama.ResponseError, reports(OLLAMA_LINE), OLLAMA_STREAM, ("options", "num_predict")),
}  # fmt: skip


async def proxied(start: Start, name: str, *limits: str) -> Wire:
    sdk = SDKS[name]

    async def serving(request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        sent = json.loads(request.body)
        streams = sent.get("stream") is True or "stream" in request.start
        writer.write(sdk.stream if streams else sdk.answer)
        return True

    row = RouteRow("POST /{rest...}", name="any", tokens=name, error_shape=name)
    wire = await start(serving=Upstream(serving), rows=[row])
    wire.identities.add(fakes.key(1), fakes.identity(plan=plan(*limits)))
    return wire


async def call(wire: Wire, name: str, *, streams: bool) -> str:
    url = f"http://{wire.address[0]}:{wire.address[1]}"
    return await asyncio.to_thread(SDKS[name].ask, url, streams)


@pytest.mark.parametrize("name", SDKS)
@pytest.mark.parametrize("streams", [False, True])
async def test_an_sdk_works_with_caps_and_streams(start: Start, name: str, streams: bool) -> None:
    wire = await proxied(start, name, "tokens/day=100000")
    assert await call(wire, name, streams=streams) == "Hi"
    value = json.loads(wire.upstream.requests[-1].body)
    for member in SDKS[name].cap:
        value = value[member]
    assert not SDKS[name].cap or value == 4_096
    assert [tokens for _, _, tokens in wire.ledger.settled] == [22]


@pytest.mark.parametrize("name", SDKS)
async def test_an_sdk_raises_at_once_for_what_never_fits(start: Start, name: str) -> None:
    wire = await proxied(start, name, "tokens/day=20")
    began = time.monotonic()
    with pytest.raises(SDKS[name].refused) as raised:
        await call(wire, name, streams=False)
    assert "token" in str(raised.value)
    assert time.monotonic() - began < 5.0
    assert [one.status for one in wire.recorder.seen] == [403]


@pytest.mark.parametrize("name", ["openai", "anthropic"])
async def test_an_sdk_with_default_retries_raises_at_once_for_a_spent_budget(start: Start, name: str) -> None:
    # One call is charged 22. The next one needs its input and at least its maximum, or 16 tokens of output.
    wire = await proxied(start, name, "tokens/day=72" if name == "anthropic" else "tokens/day=40")
    assert await call(wire, name, streams=False) == "Hi"
    began = time.monotonic()
    with pytest.raises(SDKS[name].refused):
        await call(wire, name, streams=False)
    assert time.monotonic() - began < 5.0
    refusals = [one for one in wire.recorder.seen if one.status != 200]
    assert [(one.status, one.limit_reason) for one in refusals] == [(429, "spent")]
