"""What a caller hears of a refusal."""

from __future__ import annotations

import json

import pytest

from keyproxy.problems import ERROR_SHAPES, Answer, Problems
from keyproxy.reasons import Reason, Refusal

CHALLENGE = 'Api-Key realm="keyproxy"'
KEY_REFUSALS = {Reason.KEY_INVALID, Reason.KEY_EXPIRED, Reason.KEY_REVOKED, Reason.ACCOUNT_DISABLED}

each_reason = pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.code)
each_shape = pytest.mark.parametrize("shape", ERROR_SHAPES)


def fields(answer: Answer) -> dict[str, str]:
    assert answer.fields.endswith(b"\r\n")
    lines = answer.fields.decode("ascii").split("\r\n")[:-1]
    found = dict(line.split(": ", 1) for line in lines)
    assert len(found) == len(lines)
    return found


@each_reason
def test_a_problem_says_what_the_contract_says(reason: Reason) -> None:
    answer = Problems().answer(Refusal(reason, "for our log", said="And this."), "r-1")
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


@each_reason
@each_shape
def test_every_shape_has_the_code_and_never_what_is_for_our_log(reason: Reason, shape: str) -> None:
    answer = Problems().answer(Refusal(reason, "for our log"), "r-1", shape)
    content = json.loads(answer.body)
    error = content if shape == "problem" else content["error"]
    assert answer.status == reason.value.status
    assert error["code"] == reason.code
    assert error["detail" if shape == "problem" else "message"] == reason.value.sentence
    assert b"for our log" not in answer.body + answer.fields


@each_reason
@each_shape
def test_the_fields_that_a_status_asks_for_are_there_and_no_others(reason: Reason, shape: str) -> None:
    told = fields(Problems().answer(Refusal(reason), "r-1", shape))
    status, wait = reason.value.status, reason.value.retry_after_seconds
    assert told.get("WWW-Authenticate") == (CHALLENGE if status == 401 else None)
    assert told.get("Retry-After") == (None if wait is None else str(wait))
    assert ("Retry-After" in told) == (status in (429, 503))


def test_a_missing_scope_is_named_in_the_challenge() -> None:
    told = fields(Problems().answer(Refusal(Reason.SCOPE_INSUFFICIENT, missing_scope="jobs:write"), "r-1"))
    assert told["WWW-Authenticate"] == f'{CHALLENGE}, error="insufficient_scope", scope="jobs:write"'


@pytest.mark.parametrize(("wait", "told"), [(0, "0"), (1, "1"), (3600, "3600")])
def test_a_wait_of_one_refusal_is_told_instead_of_the_usual(wait: int, told: str) -> None:
    answer = Problems().answer(Refusal(Reason.OVERLOADED, retry_after_seconds=wait), "r-1")
    assert fields(answer)["Retry-After"] == told


@each_reason
def test_the_operator_s_status_is_for_keys_that_were_shown_and_not_accepted(reason: Reason) -> None:
    problems = Problems(invalid_key_status=403)
    expected = 403 if reason in KEY_REFUSALS else reason.value.status
    answer = problems.answer(Refusal(reason), "r-1")
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
def test_an_sdk_finds_the_type_that_its_exceptions_go_by(reason: Reason, openai: str, anthropic: str) -> None:
    problems = Problems()
    openai_answer = problems.answer(Refusal(reason), "r-1", "openai")
    assert json.loads(openai_answer.body)["error"]["type"] == openai
    assert json.loads(openai_answer.body)["error"]["param"] is None
    anthropic_answer = problems.answer(Refusal(reason), "r-1", "anthropic")
    content = json.loads(anthropic_answer.body)
    assert (content["type"], content["error"]["type"], content["request_id"]) == ("error", anthropic, "r-1")
    assert {fields(answer)["Content-Type"] for answer in (openai_answer, anthropic_answer)} == {"application/json"}
