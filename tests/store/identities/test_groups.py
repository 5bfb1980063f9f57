"""Groups: users and tenants in the identity cache."""

from __future__ import annotations

import weakref

from keyproxy.store.identities.groups import Group


def test_only_groups_with_entries_are_kept_however_often_a_user_changes() -> None:
    oldest = Group()
    newest, made = oldest, []
    for _ in range(1_000):
        newest = newest.supersede()
        made.append(weakref.ref(newest))
    assert sum(group() is not None for group in made) == 1
    assert (oldest.is_current, oldest.is_usable) == (False, True)
    newest.end()
    assert not oldest.is_usable


def test_newest_group_lives_as_long_as_an_entry_refers_to_an_older_one() -> None:
    first = Group()
    second = first.supersede()
    third = weakref.ref(second.supersede())
    fourth = third().supersede()  # type: ignore[union-attr]
    newest = weakref.ref(fourth)
    del second, fourth
    assert third() is None
    assert newest() is not None
    newest().end()  # type: ignore[union-attr]
    assert not first.is_usable
    del first
    assert newest() is None
