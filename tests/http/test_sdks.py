"""The vendors' SDKs handle refusals: `except RateLimitError` of their users has to work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import httpx2
import pytest

from keyproxy.http.error_responses import ErrorRenderer
from keyproxy.http.own_response import OwnResponse
from keyproxy.limit_state import LimitPolicy, LimitState
from keyproxy.reasons import LimitReason, Reason, Refusal
from tests.lazy_modules import lazily, load

if TYPE_CHECKING:
    import anthropic
    import openai
else:
    anthropic, openai = lazily("anthropic", "openai")

LIMIT = LimitState(LimitPolicy("user.tokens-per-day", 1000, 86_400, "tokens"), 3, 30)
OVER_LIMIT = [Reason.RATE_LIMITED, Reason.CONCURRENCY_LIMITED, Reason.QUOTA_EXHAUSTED, Reason.TOKEN_BUDGET_EXHAUSTED]

CHUNK = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'
)
MESSAGE_START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","type":"message","role":"assistant",'
    b'"content":[],"model":"m","stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":3,"output_tokens":1}}}\n\n'
)

Server = Callable[[httpx2.Request], httpx2.Response]


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """What the tests measure does not include the imports."""
    load(anthropic, openai)


def answering(answer: OwnResponse) -> Server:
    lines = [line.split(": ", 1) for line in answer.fields.decode("ascii").split("\r\n")[:-1]]
    return lambda _: httpx2.Response(
        answer.status, headers=[(name, value) for name, value in lines], content=answer.body
    )


def streaming(content: bytes) -> Server:
    return lambda _: httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=content)


def ask_openai(server: Server) -> openai.OpenAI:
    client = httpx2.Client(transport=httpx2.MockTransport(server))
    return openai.OpenAI(api_key="k", base_url="http://proxy/v1", max_retries=0, http_client=client)


def ask_anthropic(server: Server) -> anthropic.Anthropic:
    client = httpx2.Client(transport=httpx2.MockTransport(server))
    return anthropic.Anthropic(api_key="k", base_url="http://proxy", max_retries=0, http_client=client)


def refused(reason: Reason, shape: str) -> OwnResponse:
    return ErrorRenderer().render(Refusal(reason, limit=LIMIT), "r-1", shape)


class Counting:
    """A server that counts its requests."""

    def __init__(self, server: Server) -> None:
        self.requests = 0
        self._server = server

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests += 1
        return self._server(request)


def with_default_retries(server: Server, shape: str) -> tuple[type[Exception], Callable[[], object]]:
    """The exception for a status, and a call that raises it, with the default retries of the SDK."""
    http = httpx2.Client(transport=httpx2.MockTransport(server))
    if shape == "openai":
        client = openai.OpenAI(api_key="k", base_url="http://proxy/v1", http_client=http)
        assert client.max_retries == openai.DEFAULT_MAX_RETRIES > 0
        return openai.APIStatusError, lambda: client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}]
        )
    other = anthropic.Anthropic(api_key="k", base_url="http://proxy", http_client=http)
    assert other.max_retries == anthropic.DEFAULT_MAX_RETRIES > 0
    return anthropic.APIStatusError, lambda: other.messages.create(
        model="m", max_tokens=5, messages=[{"role": "user", "content": "Hi"}]
    )


@pytest.mark.parametrize("shape", ["openai", "anthropic"])
@pytest.mark.parametrize("status", [429, 402])
@pytest.mark.parametrize(
    "reason",
    [Reason.QUOTA_EXHAUSTED, Reason.TOKEN_BUDGET_EXHAUSTED, Reason.TOKEN_LIMIT_PER_REQUEST],
    ids=lambda reason: reason.code,
)
def test_an_sdk_with_default_retries_raises_at_once_when_retrying_is_futile(
    reason: Reason, status: int, shape: str
) -> None:
    answer = ErrorRenderer(spent_status=status).render(Refusal(reason, limit=LIMIT), "r-1", shape)
    server = Counting(answering(answer))
    error, call = with_default_retries(server, shape)
    started = time.monotonic()
    with pytest.raises(error) as caught:
        call()
    assert (server.requests, time.monotonic() - started < 0.4) == (1, True)
    assert reason.code.encode() in answer.body
    assert isinstance(caught.value, openai.APIStatusError | anthropic.APIStatusError)
    assert caught.value.response.content == answer.body


@pytest.mark.parametrize("shape", ["openai", "anthropic"])
def test_an_sdk_with_default_retries_retries_when_requests_in_flight_reserve_the_window(shape: str) -> None:
    refusal = Refusal(Reason.TOKEN_BUDGET_EXHAUSTED, limit=LIMIT, retry_after_seconds=1, limit_reason=LimitReason.HELD)
    server = Counting(answering(ErrorRenderer(spent_status=402).render(refusal, "r-1", shape)))
    error, call = with_default_retries(server, shape)
    started = time.monotonic()
    with pytest.raises(error):
        call()
    assert server.requests == 3
    assert 2.0 <= time.monotonic() - started < 4.0


@pytest.mark.parametrize("reason", OVER_LIMIT, ids=lambda reason: reason.code)
def test_the_openai_sdk_raises_its_rate_limit_error(reason: Reason) -> None:
    with ask_openai(answering(refused(reason, "openai"))) as client, pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == reason.code
    assert caught.value.type == "rate_limit_error"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["remaining"] == 3
    assert caught.value.response.headers["Retry-After"] == "30"


@pytest.mark.parametrize("reason", OVER_LIMIT, ids=lambda reason: reason.code)
def test_the_anthropic_sdk_raises_its_rate_limit_error(reason: Reason) -> None:
    server = answering(refused(reason, "anthropic"))
    with ask_anthropic(server) as client, pytest.raises(anthropic.RateLimitError) as caught:
        client.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "Hi"}])
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["code"] == reason.code
    assert caught.value.response.headers["Retry-After"] == "30"


def test_request_that_can_never_fit_raises_permission_denied_in_both_sdks() -> None:
    reason = Reason.TOKEN_LIMIT_PER_REQUEST
    with (
        ask_openai(answering(refused(reason, "openai"))) as client,
        pytest.raises(openai.PermissionDeniedError, match="more tokens than the plan allows per request"),
    ):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    with (
        ask_anthropic(answering(refused(reason, "anthropic"))) as other,
        pytest.raises(anthropic.PermissionDeniedError, match="more tokens than the plan allows per request"),
    ):
        other.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "Hi"}])


def test_the_openai_sdk_yields_received_events_and_raises_when_a_stream_is_ended() -> None:
    last = ErrorRenderer().last_event(Refusal(Reason.TOKEN_BUDGET_EXHAUSTED, limit=LIMIT), "r-1", "openai")
    received: list[str | None] = []
    with ask_openai(streaming(CHUNK + last)) as client:
        stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}], stream=True)
        with pytest.raises(openai.APIError, match="token budget") as caught:
            received.extend(chunk.choices[0].delta.content for chunk in stream)
    assert received == ["Hi"]
    assert caught.value.code == "token_budget_exhausted"
    assert caught.value.type == "rate_limit_error"


def test_the_anthropic_sdk_yields_received_events_and_raises_when_a_stream_is_ended() -> None:
    last = ErrorRenderer().last_event(Refusal(Reason.TOKEN_BUDGET_EXHAUSTED, limit=LIMIT), "r-1", "anthropic")
    received: list[str] = []
    with ask_anthropic(streaming(MESSAGE_START + last)) as client:
        stream = client.messages.create(
            model="m", max_tokens=5, messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        with pytest.raises(anthropic.APIStatusError, match="token budget") as caught:
            received.extend(event.type for event in stream)
    assert received == ["message_start"]
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "rate_limit_error"
