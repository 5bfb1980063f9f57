"""Problems of the admin API: public codes, and the document that they share with refusals of the proxy."""

from __future__ import annotations

import json

import pytest

from keyproxy.admin.problems import FieldError, Problem, Refused, problem_body, problem_response
from keyproxy.http.error_responses import ErrorRenderer
from keyproxy.http.problem_json import MEDIA_TYPE
from keyproxy.reasons import Reason, Refusal

each_problem = pytest.mark.parametrize("problem", Problem, ids=lambda problem: problem.code)


@each_problem
def test_problem_document_has_the_members_of_a_refusal_of_the_proxy(problem: Problem) -> None:
    content = json.loads(problem_body(Refused(problem), "r-1"))
    refusal = json.loads(ErrorRenderer().render(Refusal(Reason.KEY_INVALID), "r-1").body)
    assert list(content) == list(refusal)
    assert content == {
        "type": f"urn:keyproxy:problem:{problem.code}", "title": problem.value.title, "status": problem.status,
        "detail": problem.value.sentence, "code": problem.code, "request_id": "r-1",
    }  # fmt: skip


@each_problem
def test_problem_response_states_its_wait_if_and_only_if_it_has_one(problem: Problem) -> None:
    response = problem_response(Refused(problem), "r-1")
    assert (response.status, response.content_type) == (problem.status, MEDIA_TYPE)
    wait = problem.value.retry_after_seconds
    assert response.headers.get("Retry-After") == (None if wait is None else str(wait))
    assert problem_response(Refused(problem, retry_after_seconds=7), "r-1").headers["Retry-After"] == "7"
    assert ("WWW-Authenticate" in response.headers) == (problem.status == 401)


def test_every_503_of_the_admin_api_states_when_to_retry() -> None:
    assert [one.code for one in Problem if one.status == 503 and one.value.retry_after_seconds is None] == []


def test_codes_of_problems_are_unique() -> None:
    assert len(Problem.__members__) == len({problem.code for problem in Problem})


def test_detail_replaces_the_sentence_and_keys_are_masked_in_every_text() -> None:
    key = "kp_live_" + "0" * 49
    errors = [FieldError(f"body.{key}", f"no {key}")]
    text = problem_body(Refused(Problem.INVALID, f"no {key}", errors=errors), "r-1").decode()
    assert key not in text
    content = json.loads(text)
    assert content["detail"].startswith("no ")
    assert content["errors"][0]["field"].startswith("body.")
