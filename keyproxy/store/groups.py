"""Users and tenants as the identity cache sees them: what puts all entries of one of them out of date at once.

A group lives as long as an entry refers to it: tables of groups hold them weakly. That is why the class has a module of
its own, which is not compiled: objects of compiled classes cannot be referred to weakly.
"""

from __future__ import annotations


class Group:
    """A user or a tenant. All entries of its keys refer to it: one write puts all of them out of date."""

    __slots__ = ("__weakref__", "is_current")

    def __init__(self) -> None:
        self.is_current = True
