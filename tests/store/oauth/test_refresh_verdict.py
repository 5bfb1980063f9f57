"""The verdict on the use of a refresh token: the table, and that a use has no more rights later than earlier."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from keyproxy.store.oauth.refresh_verdict import SUCCESSORS_MAX, RefreshUse, RefreshVerdict, judge_refresh

UNUSED = RefreshUse(is_replaced=False, is_used=False, is_past_grace=False, successors=0, has_used_successor=False)
USED = dataclasses.replace(UNUSED, is_used=True, successors=1)
LATE = dataclasses.replace(USED, is_past_grace=True)


@pytest.mark.parametrize(
    ("use", "verdict"),
    [
        (UNUSED, "rotate"),
        (dataclasses.replace(UNUSED, is_replaced=True), "reuse"),
        (USED, "repeat"),
        (dataclasses.replace(USED, is_replaced=True), "reuse"),
        (dataclasses.replace(USED, has_used_successor=True), "repeat"),
        (dataclasses.replace(USED, successors=SUCCESSORS_MAX - 1), "repeat"),
        (dataclasses.replace(USED, successors=SUCCESSORS_MAX), "too many"),
        (LATE, "replace"),
        (dataclasses.replace(LATE, successors=0), "replace"),
        (dataclasses.replace(LATE, successors=SUCCESSORS_MAX - 1), "replace"),
        (dataclasses.replace(LATE, successors=SUCCESSORS_MAX), "reuse"),
        (dataclasses.replace(LATE, has_used_successor=True), "reuse"),
        (dataclasses.replace(LATE, is_replaced=True), "reuse"),
    ],
)
def test_verdict_follows_the_first_condition_that_matches(use: RefreshUse, verdict: str) -> None:
    assert judge_refresh(use, grace_seconds=60) is RefreshVerdict(verdict)


def test_without_a_grace_every_second_use_is_a_reuse() -> None:
    flags = itertools.product([False, True], [False, True], range(SUCCESSORS_MAX + 1), [False, True])
    for is_replaced, is_past_grace, successors, has_used in flags:
        use = RefreshUse(is_replaced, True, is_past_grace, successors, has_used)
        assert judge_refresh(use, grace_seconds=0) is RefreshVerdict.REUSE
    assert judge_refresh(UNUSED, grace_seconds=0) is RefreshVerdict.ROTATE
