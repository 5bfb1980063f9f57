"""The vendors' SDKs, with their default retries, against an upstream of bytes through the proxy."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import trustme
from botocore.exceptions import ClientError, EventStreamError

from keyproxy.ai.responses.streams.aws_event_stream import make_message
from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.config.schema import RouteRow
from keyproxy.model import Ending
from tests import fakes
from tests.lazy_modules import lazily, load
from tests.rawhttp import Message, Upstream
from tests.waiting import until
from tests.wire.conftest import KEY, Start, Wire
from tests.wire.test_ai_endings import Streaming, charged
from tests.wire.test_ai_examples import HELLO, plan, reports
from tests.wire.test_ai_examples import MESSAGES as OPENAI_MESSAGES
from tests.wire.test_limits import STREAM, chunk

if TYPE_CHECKING:
    import anthropic
    import boto3
    import ollama
    import openai
    from google import genai
else:
    anthropic, boto3, genai, ollama, openai = lazily("anthropic", "boto3", "google.genai", "ollama", "openai")

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
BEDROCK_STREAM_HEAD = STREAM.replace(b"text/event-stream", b"application/vnd.amazon.eventstream")
BEDROCK_USAGE = {
    "inputTokens": 8, "outputTokens": 9, "totalTokens": 22, "cacheReadInputTokens": 3, "cacheWriteInputTokens": 2,
}  # fmt: skip
CONVERSE = reports(
    {
        "output": {"message": {"role": "assistant", "content": [{"text": "Hi"}]}}, "stopReason": "end_turn",
        "usage": BEDROCK_USAGE, "metrics": {"latencyMs": 1},
    }
)  # fmt: skip


def aws_event(kind: str, payload: dict[str, Any]) -> bytes:
    headers = {":event-type": kind, ":content-type": "application/json", ":message-type": "event"}
    return chunk(make_message(headers, json.dumps(payload).encode()))


BEDROCK_BEGINNING = (
    BEDROCK_STREAM_HEAD
    + aws_event("messageStart", {"role": "assistant"})
    + aws_event("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "Hi"}})
)
CONVERSE_STREAM = (
    BEDROCK_BEGINNING
    + aws_event("contentBlockStop", {"contentBlockIndex": 0})
    + aws_event("messageStop", {"stopReason": "end_turn"})
    + aws_event("metadata", {"usage": BEDROCK_USAGE, "metrics": {"latencyMs": 1}})
    + b"0\r\n\r\n"
)
#: boto3 sends a bearer token over TLS only.
AUTHORITY = trustme.CA()


class Sdk(NamedTuple):
    """How an SDK asks, for a whole response and for a stream, and the exception that it raises for a refusal."""

    ask: Callable[[str, bool], str]
    refused: Callable[[], type[Exception]]
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
    options = genai.types.HttpOptions(base_url=url, headers={"X-Api-Key": SECRET})
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


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """What the tests measure does not include the imports."""
    load(anthropic, boto3, genai, ollama, openai)


@pytest.fixture(autouse=True)
def bedrock_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 takes the bearer token from the environment."""
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", SECRET)
    for name in ("AWS_PROFILE", "AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


@contextmanager
def bedrock(url: str) -> Iterator[Any]:
    """A client of boto3 with its default configuration, which includes its retries."""
    with AUTHORITY.cert_pem.tempfile() as authority:
        session = boto3.Session(region_name="us-east-1")
        client = session.client("bedrock-runtime", endpoint_url=url.replace("http:", "https:"), verify=authority)
        try:
            yield client
        finally:
            client.close()


BEDROCK_CALL: dict[str, Any] = {"modelId": "m", "messages": [{"role": "user", "content": [{"text": HELLO}]}]}


def with_bedrock(url: str, streams: bool) -> str:
    with bedrock(url) as client:
        if not streams:
            text: str = client.converse(**BEDROCK_CALL)["output"]["message"]["content"][0]["text"]
            return text
        events = list(client.converse_stream(**BEDROCK_CALL)["stream"])
    assert [next(iter(one)) for one in events][-2:] == ["messageStop", "metadata"]
    assert events[-1]["metadata"]["usage"] == BEDROCK_USAGE
    return "".join(one["contentBlockDelta"]["delta"]["text"] for one in events if "contentBlockDelta" in one)


SDKS = {
    "openai": Sdk(with_openai, lambda: openai.APIStatusError, OPENAI, OPENAI_STREAM, ("max_completion_tokens",)),
    "anthropic": Sdk(with_anthropic, lambda: anthropic.APIStatusError, reports(ANTHROPIC_MESSAGE), ANTHROPIC_STREAM, ()),
    "gemini": Sdk(
        with_gemini, lambda: genai.errors.APIError, reports(GEMINI_CHUNK), GEMINI_STREAM,
        ("generationConfig", "maxOutputTokens"),
    ),
    "ollama": Sdk(
        with_ollama, lambda: ollama.ResponseError, reports(OLLAMA_LINE), OLLAMA_STREAM, ("options", "num_predict"),
    ),
    "bedrock": Sdk(with_bedrock, lambda: ClientError, CONVERSE, CONVERSE_STREAM, ("inferenceConfig", "maxTokens")),
}  # fmt: skip


def serving_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("127.0.0.1").configure_cert(context)
    return context


async def proxied(start: Start, name: str, *limits: str, upstream: Upstream | None = None) -> Wire:
    sdk = SDKS[name]

    async def serving(request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        sent = json.loads(request.body)
        streams = sent.get("stream") is True or "stream" in request.start
        writer.write(sdk.stream if streams else sdk.answer)
        return True

    row = RouteRow("POST /{rest...}", name="any", tokens=name, error_shape=name)
    tls = serving_tls() if name == "bedrock" else None
    wire = await start(serving=upstream or Upstream(serving), rows=[row], tls=tls)
    wire.identities.add(fakes.key(1), fakes.identity(plan=plan(*limits)))
    return wire


def url_of(wire: Wire) -> str:
    return f"http://{wire.address[0]}:{wire.address[1]}"


async def call(wire: Wire, name: str, *, streams: bool) -> str:
    return await asyncio.to_thread(SDKS[name].ask, url_of(wire), streams)


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
    with pytest.raises(SDKS[name].refused()) as raised:
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
    with pytest.raises(SDKS[name].refused()):
        await call(wire, name, streams=False)
    assert time.monotonic() - began < 5.0
    refusals = [one for one in wire.recorder.seen if one.status != 200]
    assert [(one.status, one.limit_reason) for one in refusals] == [(429, "spent")]


# -- boto3: how it retries, and AWS's event stream


def statuses(wire: Wire) -> list[tuple[int, str]]:
    return [(one.status, one.limit_reason) for one in wire.recorder.seen]


async def test_boto3_gets_the_error_type_and_the_code_of_a_refusal(start: Start) -> None:
    wire = await proxied(start, "bedrock", "tokens/day=20")
    with pytest.raises(ClientError) as raised:
        await call(wire, "bedrock", streams=False)
    response = raised.value.response
    assert response["Error"]["Code"] == "AccessDeniedException"
    assert type(raised.value).__name__ == "AccessDeniedException"
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert response["ResponseMetadata"]["RetryAttempts"] == 0
    assert statuses(wire) == [(403, "never_fits")]


async def test_boto3_with_default_retries_gives_up_on_a_spent_budget_within_seconds(start: Start) -> None:
    wire = await proxied(start, "bedrock", "tokens/day=40")
    assert await call(wire, "bedrock", streams=False) == "Hi"
    began = time.monotonic()
    with pytest.raises(ClientError) as raised:
        await call(wire, "bedrock", streams=False)
    assert raised.value.response["Error"]["Code"] == "ThrottlingException"
    assert time.monotonic() - began < 8.0
    assert statuses(wire)[1:] == [(429, "spent")] * 3
    assert [tokens for _, _, tokens in wire.ledger.settled] == [22]


async def test_boto3_waits_as_long_as_a_refusal_says(start: Start) -> None:
    wire = await proxied(start, "bedrock", "request-rate=15/min:1")

    def twice() -> float:
        with bedrock(url_of(wire)) as client:
            client.converse(**BEDROCK_CALL)
            began = time.monotonic()
            client.converse(**BEDROCK_CALL)
            return time.monotonic() - began

    # Its own first wait is at most one second.
    assert await asyncio.to_thread(twice) >= 2.0
    assert statuses(wire) == [(200, ""), (429, "pace"), (200, "")]


@pytest.mark.parametrize("streams", [False, True])
async def test_boto3_with_default_retries_succeeds_once_held_units_are_free(start: Start, streams: bool) -> None:
    release = asyncio.Event()

    async def serving(request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await release.wait()
        writer.write(CONVERSE_STREAM if "stream" in request.start else CONVERSE)
        return True

    wire = await proxied(start, "bedrock", "tokens/day=60", upstream=Upstream(serving))
    first = asyncio.ensure_future(call(wire, "bedrock", streams=streams))
    await until(lambda: bool(wire.upstream.requests), "the first call is under way")
    second = asyncio.ensure_future(call(wire, "bedrock", streams=streams))
    await until(lambda: bool(wire.recorder.seen), "the second call is refused", seconds=20)
    release.set()
    assert (await first, await second) == ("Hi", "Hi")
    assert sorted(statuses(wire)) == [(200, ""), (200, ""), (429, "held")]
    assert [tokens for _, _, tokens in wire.ledger.settled] == [22, 22]


async def test_the_usage_of_a_converse_stream_is_charged_with_its_cached_parts(start: Start) -> None:
    wire = await proxied(start, "bedrock", "tokens/day=100000")
    assert await call(wire, "bedrock", streams=True) == "Hi"
    assert wire.recorder.seen[-1].use == TokenUse(13, 9, cached=3, cache_write=2)


async def test_boto3_raises_the_exception_that_ends_a_stream_beyond_its_budget(start: Start) -> None:
    delta = aws_event("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "word " * 100}})
    streaming = Streaming(BEDROCK_BEGINNING + delta * 40)
    wire = await proxied(start, "bedrock", "tokens/day=300", upstream=streaming.upstream)

    def read() -> None:
        with bedrock(url_of(wire)) as client:
            for _ in client.converse_stream(**BEDROCK_CALL)["stream"]:
                pass

    with pytest.raises(EventStreamError) as raised:
        await asyncio.to_thread(read)
    assert raised.value.response["Error"]["Code"] == "throttlingException"
    assert "token" in raised.value.response["Error"]["Message"]
    await until(lambda: streaming.aborted_mono > 0, "the upstream is aborted")
    assert wire.recorder.seen[-1].ending is Ending.CUT


async def test_a_converse_stream_that_boto3_leaves_is_aborted_and_charged_what_came(start: Start) -> None:
    streaming = Streaming(BEDROCK_BEGINNING)
    wire = await proxied(start, "bedrock", "tokens/day=100000", upstream=streaming.upstream)

    def read() -> None:
        with bedrock(url_of(wire)) as client:
            stream = client.converse_stream(**BEDROCK_CALL)["stream"]
            for one in stream:
                if "contentBlockDelta" in one:
                    break
            stream.close()

    await asyncio.to_thread(read)
    assert await charged(wire) == 14 + 1
    await until(lambda: streaming.aborted_mono > 0, "the upstream is aborted")
    assert wire.recorder.seen[-1].ending is Ending.CLIENT_GONE
    assert wire.recorder.seen[-1].is_estimated
