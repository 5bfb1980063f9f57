"""Responses to refused requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from keyproxy.http.error_responses import ERROR_SHAPES, ErrorRenderer
from keyproxy.http.own_response import OwnResponse
from keyproxy.limit_state import LimitPolicy, LimitState
from keyproxy.reasons import NEVER_FITS, SPENT, LimitReason, Reason, Refusal

CHALLENGE = 'Api-Key realm="keyproxy"'
KEY_REFUSALS = {
    Reason.KEY_INVALID, Reason.KEY_EXPIRED, Reason.KEY_REVOKED, Reason.ACCOUNT_DISABLED, Reason.KEY_SUSPENDED,
}  # fmt: skip

each_reason = pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.code)
each_shape = pytest.mark.parametrize("shape", ERROR_SHAPES)


def fields(answer: OwnResponse) -> dict[str, str]:
    assert answer.fields.endswith(b"\r\n")
    lines = answer.fields.decode("ascii").split("\r\n")[:-1]
    found = dict(line.split(": ", 1) for line in lines)
    assert len(found) == len(lines)
    return found


def error_object(answer: OwnResponse, shape: str) -> dict[str, Any]:
    """The members of an error, wherever its format has them."""
    content = json.loads(answer.body)
    if shape == "ollama":
        return {**content, "message": content["error"]}
    if shape == "gemini":
        (info,) = content["error"]["details"]
        members = {name: parsed(value) for name, value in info.get("metadata", {}).items()}
        return {"reset_seconds": None, **members, "code": info["reason"], "message": content["error"]["message"]}
    if shape == "mcp":
        return {**content["error"]["data"], "message": content["error"]["data"]["detail"]}
    error = content if shape in ("problem", "bedrock") else content["error"]
    assert isinstance(error, dict)
    return error


def parsed(value: str) -> object:
    return json.loads(value) if value in ("true", "false") or value.isdigit() else value


@each_reason
def test_problem_has_the_documented_members(reason: Reason) -> None:
    answer = ErrorRenderer().render(Refusal(reason, "for our log", caller_text="And this."), "r-1")
    row = reason.value
    assert answer.status == row.status
    assert answer.reason_phrase
    assert fields(answer)["Content-Type"] == "application/problem+json"
    assert fields(answer)["Cache-Control"] == "no-store"
    assert json.loads(answer.body) == {
        "type": f"urn:keyproxy:problem:{row.code}",
        "title": row.title,
        "status": row.status,
        "detail": f"{row.sentence} And this.",
        "code": row.code,
        "request_id": "r-1",
    }


@each_shape
def test_refusal_with_its_own_sentence_names_the_member_at_fault(shape: str) -> None:
    refusal = Refusal(
        Reason.REQUEST_MALFORMED, caller_text="'max_tokens' is a string.", replaces_sentence=True, field="max_tokens"
    )
    error = error_object(ErrorRenderer().render(refusal, "r-1", shape), shape)
    assert error["code"] == "request_malformed"
    assert error["detail" if shape == "problem" else "message"] == "'max_tokens' is a string."
    assert error.get("param") == ("max_tokens" if shape == "openai" else None)


@each_reason
@each_shape
def test_every_format_has_the_code_and_never_the_log_detail(reason: Reason, shape: str) -> None:
    answer = ErrorRenderer().render(Refusal(reason, "for our log"), "r-1", shape)
    error = error_object(answer, shape)
    assert answer.status == reason.value.status
    assert error["code"] == reason.code
    assert error["detail" if shape == "problem" else "message"] == reason.value.sentence
    assert b"for our log" not in answer.body + answer.fields


@each_reason
@each_shape
def test_response_has_exactly_the_fields_that_its_status_requires(reason: Reason, shape: str) -> None:
    headers = fields(ErrorRenderer().render(Refusal(reason), "r-1", shape))
    status, wait = reason.value.status, reason.value.retry_after_seconds
    assert headers.get("WWW-Authenticate") == (CHALLENGE if status == 401 else None)
    assert headers.get("Retry-After") == (None if wait is None else str(wait))
    assert ("Retry-After" in headers) == (status in (429, 503) or reason is Reason.APPROVAL_REQUIRED)


@pytest.mark.parametrize("missing", [["jobs:write"], ["jobs:read", "jobs:write"]])
def test_all_missing_scopes_are_named_in_the_challenge(missing: list[str]) -> None:
    headers = fields(ErrorRenderer().render(Refusal(Reason.SCOPE_INSUFFICIENT, missing_scopes=missing), "r-1"))
    assert headers["WWW-Authenticate"] == f'{CHALLENGE}, error="insufficient_scope", scope="{" ".join(missing)}"'


@pytest.mark.parametrize(("wait", "expected"), [(0, "0"), (1, "1"), (3600, "3600")])
def test_wait_of_a_refusal_overrides_the_default(wait: int, expected: str) -> None:
    answer = ErrorRenderer().render(Refusal(Reason.OVERLOADED, retry_after_seconds=wait), "r-1")
    assert fields(answer)["Retry-After"] == expected


@each_reason
def test_configured_status_applies_to_rejected_keys(reason: Reason) -> None:
    problems = ErrorRenderer(invalid_key_status=403)
    expected = 403 if reason in KEY_REFUSALS else reason.value.status
    answer = problems.render(Refusal(reason), "r-1")
    assert (problems.status(reason), answer.status, json.loads(answer.body)["status"]) == (expected,) * 3
    assert ("WWW-Authenticate" in fields(answer)) == (expected == 401)


@pytest.mark.parametrize(
    ("reason", "openai", "anthropic"),
    [
        (Reason.REQUEST_MALFORMED, "invalid_request_error", "invalid_request_error"),
        (Reason.KEY_INVALID, "authentication_error", "authentication_error"),
        (Reason.SCOPE_INSUFFICIENT, "permission_error", "permission_error"),
        (Reason.REQUEST_TIMEOUT, "invalid_request_error", "timeout_error"),
        (Reason.BODY_TOO_LARGE, "invalid_request_error", "request_too_large"),
        (Reason.HEADERS_TOO_LARGE, "invalid_request_error", "invalid_request_error"),
        (Reason.INTERNAL_ERROR, "server_error", "api_error"),
        (Reason.UPSTREAM_INVALID, "server_error", "api_error"),
        (Reason.STORE_UNAVAILABLE, "server_error", "overloaded_error"),
        (Reason.UPSTREAM_TIMEOUT, "server_error", "timeout_error"),
    ],
)
def test_error_has_the_type_that_the_sdk_expects(reason: Reason, openai: str, anthropic: str) -> None:
    problems = ErrorRenderer()
    openai_answer = problems.render(Refusal(reason), "r-1", "openai")
    assert json.loads(openai_answer.body)["error"]["type"] == openai
    assert json.loads(openai_answer.body)["error"]["param"] is None
    anthropic_answer = problems.render(Refusal(reason), "r-1", "anthropic")
    content = json.loads(anthropic_answer.body)
    assert (content["type"], content["error"]["type"], content["request_id"]) == ("error", anthropic, "r-1")
    assert {fields(answer)["Content-Type"] for answer in (openai_answer, anthropic_answer)} == {"application/json"}


DAILY = LimitPolicy("user.requests-per-day", 100, 86_400)
TOKENS = LimitPolicy("tenant.tokens-per-month", 5000, 2_592_000, "tokens")


@each_shape
def test_limit_refusal_has_policy_remaining_quota_and_reset(shape: str) -> None:
    daily, tokens = LimitState(DAILY, 0, 61.2), LimitState(TOKENS, 4000, 1000)
    refusal = Refusal(Reason.QUOTA_EXHAUSTED, limit=daily, applied=[daily, tokens])
    answer = ErrorRenderer().render(refusal, "r-1", shape)
    error = error_object(answer, shape)
    assert {name: error[name] for name in ("policy", "limit", "remaining", "reset_seconds", "retryable")} == {
        "policy": "user.requests-per-day",
        "limit": 100,
        "remaining": 0,
        "reset_seconds": 62,
        "retryable": True,
    }
    assert fields(answer)["Retry-After"] == "62"
    assert fields(answer)["RateLimit-Policy"] == f"{DAILY.item.decode()}, {TOKENS.item.decode()}"
    assert fields(answer)["RateLimit"] == f"{DAILY.key.decode()};r=0;t=62, {TOKENS.key.decode()};r=4000;t=1000"


@each_shape
def test_request_that_can_never_fit_has_no_retry_after(shape: str) -> None:
    limit = LimitState(LimitPolicy("key.tokens-per-request", 1000, unit="tokens"), 1000)
    answer = ErrorRenderer().render(Refusal(Reason.TOKEN_LIMIT_PER_REQUEST, limit=limit), "r-1", shape)
    error = error_object(answer, shape)
    assert (answer.status, error["reset_seconds"], error["retryable"]) == (403, None, False)
    assert "Retry-After" not in fields(answer)
    assert fields(answer)["RateLimit"] == '"key.tokens-per-request";r=1000'


@each_reason
@each_shape
def test_exhausted_or_impossible_requests_have_x_should_retry_false(reason: Reason, shape: str) -> None:
    futile = SPENT | NEVER_FITS
    headers = fields(ErrorRenderer().render(Refusal(reason), "r-1", shape))
    assert headers.get("x-should-retry") == ("false" if reason in futile else None)


@each_shape
def test_reserved_window_is_429_whatever_spent_status(shape: str) -> None:
    daily = LimitState(DAILY, 0, 40_000)
    refusal = Refusal(Reason.QUOTA_EXHAUSTED, limit=daily, retry_after_seconds=3, limit_reason=LimitReason.HELD)
    answer = ErrorRenderer(spent_status=402).render(refusal, "r-1", shape)
    error = error_object(answer, shape)
    assert (answer.status, error["retryable"], error["reset_seconds"]) == (429, True, 40_000)
    assert (fields(answer)["Retry-After"], fields(answer).get("x-should-retry")) == ("3", None)


@pytest.mark.parametrize(
    ("reset", "expected"), [(None, "1"), (0, "1"), (0.2, "1"), (1.0, "1"), (1.001, "2"), (90.0, "90")]
)
def test_retry_after_the_stated_wait_is_not_too_early(reset: float | None, expected: str) -> None:
    answer = ErrorRenderer().render(Refusal(Reason.RATE_LIMITED, limit=LimitState(DAILY, 0, reset)), "r-1")
    assert fields(answer)["Retry-After"] == expected


@each_reason
def test_spent_status_applies_to_exhausted_windows(reason: Reason) -> None:
    problems = ErrorRenderer(spent_status=402)
    spent = reason in {Reason.QUOTA_EXHAUSTED, Reason.TOKEN_BUDGET_EXHAUSTED, Reason.SPEND_BUDGET_EXHAUSTED}
    assert problems.status(reason) == (402 if spent else reason.value.status)
    if spent:
        error = json.loads(problems.render(Refusal(reason), "r-1", "openai").body)["error"]
        assert (error["type"], error["code"]) == ("insufficient_quota", reason.code)
        error = json.loads(problems.render(Refusal(reason), "r-1", "anthropic").body)["error"]
        assert (error["type"], error["code"]) == ("billing_error", reason.code)


@each_shape
def test_last_event_of_an_aborted_stream_has_the_body_of_the_refusal(shape: str) -> None:
    refusal = Refusal(Reason.TOKEN_BUDGET_EXHAUSTED, limit=LimitState(TOKENS, 0, 10))
    event = ErrorRenderer().last_event(refusal, "r-1", shape)
    name, _, data = event.rpartition(b"data: ")
    assert name == (b"" if shape in ("openai", "mcp") else b"event: error\n")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2
    assert data.rstrip() == ErrorRenderer().render(refusal, "r-1", shape).body


def rpc(refusal: Refusal, rpc_id: bytes = b"") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(ErrorRenderer().render(refusal, "r-1", "mcp", rpc_id=rpc_id).body)
    return content


@pytest.mark.parametrize(("rpc_id", "value"), [(b"7", 7), (b'"a\\u00e9"', "aé")])
def test_json_rpc_error_has_the_id_of_the_request_and_the_problem_as_its_data(rpc_id: bytes, value: object) -> None:
    refusal = Refusal(Reason.APPROVAL_REQUIRED, members={"approval_id": "apr_1", "approval_state": "pending"})
    problem = json.loads(ErrorRenderer().render(refusal, "r-1").body)
    assert rpc(refusal, rpc_id) == {
        "jsonrpc": "2.0",
        "id": value,
        "error": {"code": -31403, "message": "Approval required", "data": problem},
    }
    assert problem["approval_id"] == "apr_1"


@each_reason
def test_json_rpc_error_without_a_known_id_has_none_and_a_code_outside_the_reserved_range(reason: Reason) -> None:
    content = rpc(Refusal(reason))
    assert "id" not in content
    malformed = reason is Reason.REQUEST_MALFORMED
    assert content["error"]["code"] == (-32600 if malformed else -31000 - reason.value.status)


def test_json_rpc_error_has_the_code_of_its_refusal() -> None:
    assert rpc(Refusal(Reason.REQUEST_MALFORMED, rpc_code=-32700))["error"]["code"] == -32700


def test_missing_scopes_of_a_tool_are_a_bearer_challenge_to_clients_of_mcp() -> None:
    refusal = Refusal(Reason.TOOL_NOT_ALLOWED, missing_scopes=["a", "b"], members={"missing": "scope"})
    headers = fields(ErrorRenderer().render(refusal, "r-1", "mcp"))
    assert headers["WWW-Authenticate"] == 'Bearer error="insufficient_scope", scope="a b"'
    assert headers["Content-Type"] == "application/json"


# -- kept responses


@each_shape
@each_reason
def test_every_refusal_that_states_its_reason_only_is_answered_alike_but_for_the_request_id(
    reason: Reason, shape: str
) -> None:
    renderer = ErrorRenderer()
    first = renderer.render(Refusal(reason, "a detail for the log"), "a:1/+=@", shape)
    second = renderer.render(Refusal(reason), "b-2", shape)
    assert second == ErrorRenderer().render(Refusal(reason), "b-2", shape)
    assert second == first._replace(body=first.body.replace(b"a:1/+=@", b"b-2"))
    assert json.loads(second.body)


_STATES = (LimitState(LimitPolicy("requests-per-day", 10, 86_400), 0, 60.0),)


@each_shape
@pytest.mark.parametrize(
    "more",
    [
        {"caller_text": "And this."},
        {"caller_text": "Only this.", "replaces_sentence": True},
        {"field": "model"},
        {"missing_scopes": ("a:b",)},
        {"allow": "GET"},
        {"retry_after_seconds": 77},
        {"limit": _STATES[0]},
        {"applied": _STATES},
        {"limit_reason": LimitReason.SPENT},
        {"members": {"approval_id": "apr_1"}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_refusal_that_states_more_is_never_answered_with_a_response_that_was_kept(
    more: dict[str, Any], shape: str
) -> None:
    renderer = ErrorRenderer()
    for reason in (Reason.KEY_INVALID, Reason.SCOPE_INSUFFICIENT, Reason.QUOTA_EXHAUSTED, Reason.METHOD_NOT_ALLOWED):
        plain = renderer.render(Refusal(reason), "r-1", shape)
        fresh = ErrorRenderer().render(Refusal(reason, **more), "r-1", shape)
        assert renderer.render(Refusal(reason, **more), "r-1", shape) == fresh
        assert renderer.render(Refusal(reason), "r-1", shape) == plain
