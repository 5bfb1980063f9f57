"""Users and tenants as the identity cache sees them: what puts all entries of one of them out of date at once.

A group lives as long as an entry refers to it: tables of groups hold them weakly. That is why the class has a module of
its own, which is not compiled: objects of compiled classes cannot be referred to weakly.
"""

from __future__ import annotations

import weakref


class Group:
    """A user or a tenant. All entries of its keys refer to it: one write puts all of them out of date.

    `is_current`: entries may be served without asking the store. `is_usable`: entries that are out of date may still be
    served while the store is down, because nothing changed but limits.
    """

    __slots__ = ("__weakref__", "_newer", "_older", "is_current", "is_usable")

    def __init__(self) -> None:
        self.is_current = True
        self.is_usable = True
        self._older: list[weakref.ref[Group]] = []
        self._newer: Group | None = None

    def supersede(self) -> Group:
        """Put the entries out of date; they stay usable. Return the group for entries that are read from now on.

        The new group knows the ones before it, so that `end` reaches entries which have not been read again yet. Each of
        them keeps the new group alive: until the first entry is read again, nothing else refers to it. None keeps those
        between: a group without entries goes, however often its user changes.
        """
        newer = Group()
        for reference in (*self._older, weakref.ref(self)):
            older = reference()
            if older is not None:
                older.keep(newer)
                newer._older.append(reference)
        self._older = []
        self.is_current = False
        return newer

    def keep(self, newer: Group) -> None:
        """Keep the newest group alive, in place of the one that was the newest."""
        self._newer = newer

    def end(self) -> None:
        """Put the entries out of date, of this group and of those before it; none of them is usable any more."""
        self.is_current = self.is_usable = False
        for reference in self._older:
            older = reference()
            if older is not None:
                older.is_current = older.is_usable = False
