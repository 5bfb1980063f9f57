"""Digests that are known to be refused are kept for a fixed time, and only the newest of them."""

from __future__ import annotations

import pytest

from keyproxy.reasons import Reason
from keyproxy.store.identities.refused_digests import RefusedDigests
from tests import fakes


def test_digest_is_refused_for_exactly_its_time() -> None:
    refused = RefusedDigests(10, 5.0)
    digest = fakes.key(1).digest()
    assert refused.refusal(digest, 100.0) is None
    refused.add(digest, 100.0)
    for mono in (100.0, 104.999):
        found = refused.refusal(digest, mono)
        assert found is not None
        assert (found.reason, found.detail) == (Reason.KEY_INVALID, "the store has no such key")
        assert refused.has(digest, mono)
    assert refused.refusal(digest, 105.0) is None
    assert not refused.has(digest, 105.0)
    assert refused.count(105.0) == 0


def test_each_refusal_is_a_new_one_with_the_reason_that_was_given() -> None:
    refused = RefusedDigests(10, 5.0)
    digest = fakes.key(1).digest()
    refused.add(digest, 0.0, reason=Reason.KEY_EXPIRED, detail="expired")
    first, second = refused.refusal(digest, 1.0), refused.refusal(digest, 1.0)
    assert first is not None
    assert first is not second
    assert (first.reason, first.detail) == (Reason.KEY_EXPIRED, "expired")


def test_digest_that_is_added_again_is_the_newest_and_lasts_from_then_on() -> None:
    refused = RefusedDigests(2, 5.0)
    one, two, three = (fakes.key(number).digest() for number in (1, 2, 3))
    refused.add(one, 0.0)
    refused.add(two, 1.0)
    refused.add(one, 2.0)
    refused.add(three, 3.0)
    assert not refused.has(two, 3.0)
    assert refused.has(one, 6.9)
    assert not refused.has(one, 7.0)


@pytest.mark.parametrize("entries_max", [1, 2, 100])
def test_full_table_removes_the_oldest_and_never_exceeds_its_bound(entries_max: int) -> None:
    refused = RefusedDigests(entries_max, 1_000.0)
    digests = [fakes.key(number).digest() for number in range(3 * entries_max)]
    for number, digest in enumerate(digests):
        refused.add(digest, float(number))
        assert refused.count(float(number)) == min(number + 1, entries_max)
    assert [refused.has(digest, 0.0) for digest in digests] == [False] * 2 * entries_max + [True] * entries_max


def test_expired_digests_make_room_before_those_that_are_not() -> None:
    refused = RefusedDigests(100, 5.0)
    for number in range(50):
        refused.add(fakes.key(number).digest(), 0.0)
    refused.add(fakes.key(99).digest(), 6.0)
    assert refused.count(6.0) == 1


def test_expired_digests_are_removed_a_few_at_a_time_and_refuse_nothing_meanwhile() -> None:
    refused = RefusedDigests(1_000, 5.0)
    old = [fakes.key(number).digest() for number in range(20)]
    for digest in old:
        refused.add(digest, 0.0)
    for number in range(100, 110):
        refused.add(fakes.key(number).digest(), 6.0)
        assert not any(refused.has(digest, 6.0) or refused.refusal(digest, 6.0) for digest in old)
    assert refused.count(6.0) == 10


def test_discarded_digest_is_looked_up_again() -> None:
    refused = RefusedDigests(10, 5.0)
    one, two = fakes.key(1).digest(), fakes.key(2).digest()
    refused.discard(one)
    refused.add(one, 0.0)
    refused.add(two, 0.0)
    refused.discard(one)
    assert (refused.has(one, 0.0), refused.has(two, 0.0)) == (False, True)
    refused.clear()
    assert refused.count(0.0) == 0
