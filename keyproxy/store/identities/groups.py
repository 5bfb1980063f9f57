"""Users and tenants in the identity cache: one write invalidates all entries of a user or tenant.

A group lives as long as an entry refers to it: tables of groups hold weak references. Therefore the class is in a module
of its own that is not compiled: objects of compiled classes do not support weak references.
"""

from __future__ import annotations

import weakref


class Group:
    """A user or a tenant. All entries of its keys refer to it, so one write invalidates all of them.

    `is_current`: entries may be served without a lookup. `is_usable`: outdated entries may still be served while the
    store is down, because only limits have changed.
    """

    __slots__ = ("__weakref__", "_newer", "_older", "is_current", "is_usable")

    def __init__(self) -> None:
        self.is_current = True
        self.is_usable = True
        self._older: list[weakref.ref[Group]] = []
        self._newer: Group | None = None

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
                newer._older.append(reference)
        self._older = []
        self.is_current = False
        return newer

    def keep(self, newer: Group) -> None:
        """Keep the newest group alive instead of the previous newest one."""
        self._newer = newer

    def end(self) -> None:
        """Mark the entries of this group and of the older ones outdated and unusable."""
        self.is_current = self.is_usable = False
        for reference in self._older:
            older = reference()
            if older is not None:
                older.is_current = older.is_usable = False
