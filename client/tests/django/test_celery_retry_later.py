"""When `retry_later` retries a task: for responses of httpx, requests and aiohttp."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import aiohttp
import httpx
import pytest
import requests
from aiohttp import web
from celery import Celery
from celery.exceptions import MaxRetriesExceededError, Retry

from keyproxy_client.celery import install, retry_later

RATE_LIMITED = json.dumps({"code": "rate_limited"})


def with_httpx(status: int, headers: Mapping[str, str], body: str) -> httpx.Response:
    return httpx.Response(status, headers=dict(headers), text=body)


def with_requests(status: int, headers: Mapping[str, str], body: str) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    response.headers.update(headers)
    response._content = body.encode()
    return response


class _AiohttpResponse:
    """What retry_later uses of aiohttp's response, whose constructor is private. Another test uses a real one."""

    def __init__(self, status: int, headers: Mapping[str, str], body: str | None) -> None:
        self.status = status
        self.headers = dict(headers)
        self.content = object()
        self._body = None if body is None else body.encode()


LIBRARIES = pytest.mark.parametrize("respond", [with_httpx, with_requests, _AiohttpResponse])


@pytest.fixture(scope="module")
def task() -> Any:
    app = Celery("retrying", broker="memory://", set_as_current=False)
    install(app)

    def job(self: Any) -> None:
        """Do nothing: the tests retry it from outside."""

    return app.task(job, bind=True, max_retries=3)


def countdown(task: Any, response: Any, retries: int = 0) -> float | None:
    """After how many seconds the task is retried; None if it is not."""
    task.push_request(id="1", retries=retries, called_directly=False, is_eager=True, args=(), kwargs={})
    try:
        retry_later(task, response)
    except Retry as retry:
        return float(retry.sig.options["countdown"])
    finally:
        task.pop_request()
    return None


@LIBRARIES
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("body", [RATE_LIMITED, json.dumps({"error": {"code": "token_budget_exhausted", "type": "x"}})])
def test_a_refusal_is_retried_after_its_time_plus_at_most_a_tenth(
    task: Any, respond: Callable[..., Any], status: int, body: str
) -> None:
    waits = [countdown(task, respond(status, {"Retry-After": "100"}, body)) for _ in range(20)]
    assert all(wait is not None and 100 <= wait <= 110 for wait in waits)
    assert len(set(waits)) > 1


@LIBRARIES
@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [("0", 0, 0), ("1", 1, 1.1), ("3600", 3600, 3960), ("3601", 3600, 3960), ("99999999", 3600, 3960)],
)
def test_the_wait_is_3600_seconds_at_most_plus_the_tenth(
    task: Any, respond: Callable[..., Any], retry_after: str, least: float, most: float
) -> None:
    wait = countdown(task, respond(429, {"Retry-After": retry_after}, RATE_LIMITED))
    assert wait is not None
    assert least <= wait <= most


@LIBRARIES
def test_the_time_may_be_a_date(task: Any, respond: Callable[..., Any]) -> None:
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    wait = countdown(task, respond(503, {"Retry-After": at}, RATE_LIMITED))
    assert wait is not None
    assert 55 <= wait <= 66


@LIBRARIES
@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (200, {"Retry-After": "1"}, RATE_LIMITED),
        (403, {"Retry-After": "1"}, RATE_LIMITED),
        (500, {"Retry-After": "1"}, RATE_LIMITED),
        (429, {}, RATE_LIMITED),
        (429, {"Retry-After": "soon"}, RATE_LIMITED),
        (429, {"Retry-After": "-1"}, RATE_LIMITED),
        (429, {"Retry-After": "1"}, ""),
        (429, {"Retry-After": "1"}, "rate_limited"),
        (503, {"Retry-After": "1"}, json.dumps({"code": "of_the_upstream"})),
        (503, {"Retry-After": "1"}, json.dumps(["rate_limited"])),
    ],
)
def test_any_other_response_is_not_retried(
    task: Any, respond: Callable[..., Any], status: int, headers: dict[str, str], body: str
) -> None:
    assert countdown(task, respond(status, headers, body)) is None


def test_the_last_retry_fails_as_that_of_the_task(task: Any) -> None:
    refusal = with_httpx(429, {"Retry-After": "1"}, RATE_LIMITED)
    assert countdown(task, refusal, retries=2) is not None
    with pytest.raises(MaxRetriesExceededError):
        countdown(task, refusal, retries=3)


def test_a_body_that_was_not_read_is_an_error_and_not_a_success(task: Any) -> None:
    with pytest.raises(TypeError, match="read"):
        countdown(task, _AiohttpResponse(429, {"Retry-After": "1"}, None))
    with pytest.raises(httpx.ResponseNotRead):
        countdown(task, httpx.Response(429, headers={"Retry-After": "1"}, stream=httpx.ByteStream(b"{}")))
    assert countdown(task, _AiohttpResponse(200, {}, None)) is None


def test_a_response_of_aiohttp_is_retried_after_its_session_was_closed(task: Any) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.Response(
            status=429, headers={"Retry-After": "7"}, text=RATE_LIMITED, content_type="application/json"
        )

    async def fetch() -> aiohttp.ClientResponse:
        app = web.Application()
        app.router.add_get("/", refuse)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            host, port = runner.addresses[0][:2]
            async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}/") as response:
                await response.read()
                return response
        finally:
            await runner.cleanup()

    wait = countdown(task, asyncio.run(fetch()))
    assert wait is not None
    assert 7 <= wait <= 7.7


def test_a_response_of_another_client_needs_a_status_headers_and_json(task: Any) -> None:
    headers = {"Retry-After": "7"}
    for body, is_retried in (({"code": "rate_limited"}, True), ({"code": "of_the_upstream"}, False)):
        response = SimpleNamespace(status_code=429, headers=headers, json=lambda found=body: found)
        assert (countdown(task, response) is not None) is is_retried


def test_a_task_may_raise_or_return_the_retry() -> None:
    waits: list[float] = []

    class Job:
        def __init__(self, returned: Exception | None) -> None:
            self.returned = returned

        def retry(self, countdown: float) -> Exception | None:
            waits.append(countdown)
            return self.returned

    response = with_httpx(429, {"Retry-After": "7"}, RATE_LIMITED)
    with pytest.raises(Retry):
        retry_later(Job(Retry()), response)
    retry_later(Job(None), response)
    assert [7 <= wait <= 7.7 for wait in waits] == [True, True]
