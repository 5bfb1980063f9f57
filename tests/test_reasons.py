"""Refusal reasons: public codes, statuses and texts."""

from __future__ import annotations

import re

import pytest

from keyproxy.problem_spec import Blame
from keyproxy.reasons import Reason, Refusal

#: Every public code with its status.
PUBLIC_STATUSES = {
    "api_key_missing": 401,
    "api_key_invalid": 401,
    "api_key_expired": 401,
    "api_key_revoked": 401,
    "api_key_suspended": 401,
    "account_disabled": 401,
    "credentials_ambiguous": 400,
    "key_in_url": 400,
    "request_malformed": 400,
    "method_not_allowed": 405,
    "method_not_implemented": 501,
    "expectation_failed": 417,
    "insufficient_scope": 403,
    "route_not_allowed": 403,
    "model_not_allowed": 403,
    "namespace_forbidden": 403,
    "prompt_category_not_allowed": 403,
    "delegation_refused": 403,
    "tool_not_allowed": 403,
    "approval_required": 403,
    "approval_denied": 403,
    "rate_limited": 429,
    "concurrency_limited": 429,
    "quota_exhausted": 429,
    "token_budget_exhausted": 429,
    "token_limit_per_request": 403,
    "spend_budget_exhausted": 429,
    "spend_limit_per_request": 403,
    "model_unpriced": 403,
    "output_maximum_required": 400,
    "body_too_large": 413,
    "headers_too_large": 431,
    "request_timeout": 408,
    "store_unavailable": 503,
    "ledger_unavailable": 503,
    "approvals_unavailable": 503,
    "upstream_credential_unavailable": 503,
    "overloaded": 503,
    "upstream_unreachable": 502,
    "upstream_invalid": 502,
    "upstream_timeout": 504,
    "internal_error": 500,
}

each_reason = pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.code)


@each_reason
def test_reason_has_its_public_code_and_status(reason: Reason) -> None:
    assert reason.value.status == PUBLIC_STATUSES[reason.code]


def test_codes_and_titles_are_unique() -> None:
    # An enum would merge two members with equal rows into one.
    assert len(Reason.__members__) == len({reason.code for reason in Reason})
    assert len({reason.value.title for reason in Reason}) == len(Reason)


@each_reason
def test_reason_has_a_title_and_a_complete_sentence(reason: Reason) -> None:
    row = reason.value
    assert re.fullmatch(r"[A-Z][A-Za-z]*( [A-Za-z]+)*", row.title)
    assert re.fullmatch(r"[A-Z][\x20-\x7e]*[^ .]\.", row.sentence)
    assert "  " not in row.sentence


def test_account_disabled_names_everything_whose_disabling_ends_a_credential() -> None:
    sentence = Reason.ACCOUNT_DISABLED.value.sentence
    assert all(name in sentence for name in ("user", "tenant", "agent"))


@each_reason
def test_blame_matches_the_status(reason: Reason) -> None:
    status = reason.value.status
    if reason is Reason.METHOD_NOT_IMPLEMENTED:  # the only 5xx status that is the caller's fault
        status = 400
    expected = Blame.CALLER if status < 500 else Blame.US if status in (500, 503) else Blame.UPSTREAM
    assert reason.value.blame is expected


@each_reason
def test_reason_has_a_default_wait_if_and_only_if_a_retry_can_succeed(reason: Reason) -> None:
    wait = reason.value.retry_after_seconds
    assert (wait is not None) == (reason.value.status in (429, 503) or reason is Reason.APPROVAL_REQUIRED)
    assert wait is None or wait > 0


@pytest.mark.parametrize(
    ("reason", "own", "expected"),
    [
        (Reason.OVERLOADED, None, Reason.OVERLOADED.value.retry_after_seconds),
        (Reason.OVERLOADED, 0, 0),
        (Reason.OVERLOADED, 7, 7),
        (Reason.KEY_INVALID, None, None),
    ],
)
def test_refusal_overrides_the_default_wait_of_its_reason(
    reason: Reason, own: int | None, expected: int | None
) -> None:
    assert Refusal(reason, retry_after_seconds=own).retry_after_seconds == expected
