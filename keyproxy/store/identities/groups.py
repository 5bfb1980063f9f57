"""Users, tenants and keys in the identity cache: one write invalidates all entries that depend on one of them.

A group lives as long as an entry refers to it: tables of groups hold weak references. Therefore the class is in a module
of its own that is not compiled: objects of compiled classes do not support weak references.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Final
from weakref import WeakValueDictionary

#: The kinds of groups.
USER: Final = "user"
TENANT: Final = "tenant"
KEY: Final = "key"


class Group:
    """A user, a tenant, or a key that acts. All entries that depend on it refer to it, so one write invalidates them.

    `is_current`: entries may be served without a lookup. `is_usable`: outdated entries may still be served while the
    store is down, because only limits have changed.
    """

    __slots__ = ("__weakref__", "_members", "_newer", "_older", "_parts", "is_current", "is_usable")

    def __init__(self) -> None:
        self.is_current = True
        self.is_usable = True
        self._older: tuple[weakref.ref[Group], ...] = ()
        self._newer: Group | None = None
        self._parts: tuple[Group, ...] = ()
        self._members: weakref.WeakSet[Group] | None = None

    def depend_on(self, other: Group) -> None:
        """From now on, what invalidates the entries of the other group invalidates those of this one as well.

        This group keeps the other one alive, so that a change finds it.
        """
        if other in self._parts:
            return
        self._parts = (*self._parts, other)
        other.add_member(self)

    def add_member(self, member: Group) -> None:
        """Invalidate the entries of the member with those of this group."""
        if self._members is None:
            self._members = weakref.WeakSet()
        self._members.add(member)

    def supersede(self) -> Group:
        """Mark the entries outdated but usable. Return the group for entries that are read from now on.

        The new group knows the older ones, so that `end` reaches entries that have not been read again yet. Each older
        group keeps the new one alive, since nothing else refers to it until the first entry is read again. None keeps the
        ones in between, so groups without entries are freed, however often the user changes.
        """
        newer = Group()
        for reference in (*self._older, weakref.ref(self)):
            older = reference()
            if older is not None:
                older.keep(newer)
                newer._older = (*newer._older, reference)
        self._older = ()
        self.mark(is_usable=self.is_usable)
        return newer

    def keep(self, newer: Group) -> None:
        """Keep the newest group alive instead of the previous newest one."""
        self._newer = newer

    def end(self) -> None:
        """Mark the entries of this group and of the older ones outdated and unusable."""
        self.mark(is_usable=False)
        for reference in self._older:
            older = reference()
            if older is not None:
                older.mark(is_usable=False)

    def mark(self, *, is_usable: bool) -> None:
        """Mark the entries outdated, and unusable unless `is_usable`."""
        self.is_current = False
        self.is_usable = self.is_usable and is_usable
        for member in self._members or ():
            member.mark(is_usable=is_usable)


class Groups:
    """The groups that entries refer to, by kind and name. A key is a group of the identities with which it acts."""

    def __init__(self) -> None:
        self._tables: dict[str, WeakValueDictionary[Hashable, Group]] = {
            kind: WeakValueDictionary() for kind in (USER, TENANT, KEY)
        }

    def get(self, kind: str, name: Hashable) -> Group:
        """The group for entries that are read now."""
        table = self._tables[kind]
        group = table.get(name)
        if group is None:
            group = table[name] = Group()
        return group

    def key_of(self, digest: bytes, owner: Group) -> Group:
        """The group of the identities with which a key acts. They depend on the owner of the key too."""
        keys = self._tables[KEY]
        group = keys.get(digest)
        if group is None:
            group = keys[digest] = Group()
        elif not group.is_current:
            # The limits of its owner have changed.
            group = keys[digest] = group.supersede()
        group.depend_on(owner)
        return group

    def has_key(self, digest: bytes) -> bool:
        """Whether there are entries of this key acting for any user."""
        return digest in self._tables[KEY]

    def forget(self, kind: str, name: Hashable) -> None:
        """This group was changed or deleted: its entries are outdated and unusable."""
        group = self._tables[kind].pop(name, None)
        if group is not None:
            group.end()

    def distrust(self, kind: str, name: Hashable) -> None:
        """Limits of this group have changed: its entries are outdated, and usable while the store is down."""
        group = self._tables[kind].get(name)
        if group is not None:
            self._tables[kind][name] = group.supersede()
