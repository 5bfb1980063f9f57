"""The tables of the identity cache: their bound, and what they evict."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from keyproxy.model import Identity
from keyproxy.store.identities.entries import Entry, EntryTable
from keyproxy.store.identities.groups import Group
from tests import fakes

NOW = 1_000.0


def entry(*, mark_due: float = 0.0, identity: Identity | None = None) -> Entry:
    made = Entry(identity or fakes.identity(), Group(), Group())
    made.mark_due = mark_due
    return made


def filled(entries_max: int, *, mark_due: float = 0.0) -> EntryTable[int, Entry]:
    table: EntryTable[int, Entry] = EntryTable(entries_max)
    for number in range(entries_max):
        table.put(number, entry(mark_due=mark_due), NOW)
    return table


@pytest.mark.parametrize("entries_max", [1, 2, 63, 64, 127, 128, 1_000])
@pytest.mark.parametrize("mark_due", [0.0, NOW + 60.0])
def test_full_table_never_exceeds_its_bound_and_evicts_a_64th_at_most(entries_max: int, mark_due: float) -> None:
    table = filled(entries_max, mark_due=mark_due)
    assert len(table.rows) == entries_max
    sizes = []
    for number in range(entries_max, 3 * entries_max):
        table.put(number, entry(mark_due=mark_due), NOW)
        assert number in table.rows
        sizes.append(len(table.rows))
    assert max(sizes) == entries_max
    assert min(sizes) > entries_max - max(1, entries_max // 64)


@pytest.mark.parametrize("entries_max", [3, 640])
def test_oldest_entries_are_evicted_first(entries_max: int) -> None:
    table = filled(entries_max)
    table.put(entries_max, entry(), NOW)
    kept = [*table.rows]
    assert kept == [*range(max(1, entries_max // 64), entries_max + 1)]


@pytest.mark.parametrize("entries_max", [40, 640])
def test_entry_that_was_used_in_the_last_minute_survives_an_eviction(entries_max: int) -> None:
    table = filled(entries_max)
    for number in range(10):
        table.rows[number].mark_due = NOW + 60.0
    table.put(entries_max, entry(), NOW)
    assert {*range(10)} < {*table.rows}
    assert 10 not in table.rows


def test_replaced_entry_evicts_no_other_and_counts_as_new() -> None:
    table = filled(3)
    table.rows[0].mark_due = NOW + 5.0
    table.put(0, entry(), NOW)
    assert [*table.rows] == [1, 2, 0]
    # It was marked as used already.
    assert table.rows[0].mark_due == NOW + 5.0


def test_time_of_evictions_does_not_grow_with_the_table() -> None:
    shared = fakes.identity()

    def seconds(entries_max: int) -> float:
        table: EntryTable[int, Entry] = EntryTable(entries_max)
        made = [entry(identity=shared) for _ in range(4_000)]
        for number in range(entries_max):
            table.put(number, made[number % 4_000], NOW)
        began = time.process_time()
        for number in range(entries_max, entries_max + 20_000):
            table.put(number, made[number % 4_000], NOW)
        return time.process_time() - began

    small, large = (min(seconds(size) for _ in range(3)) for size in (4_000, 64_000))
    # In quadratic time it would be 16.
    assert large < 6 * small + 0.05


def test_entries_keep_their_order_over_many_evictions() -> None:
    table = filled(200)
    for number in range(200, 5_000):
        table.put(number, entry(), NOW)
    assert all(before < after for before, after in pairwise(table.rows))
    assert len(table.rows) > 200 - 200 // 64
