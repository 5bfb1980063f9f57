"""The leases of one pool, under its present plan.

A book knows an account for as long as somebody refers to it. That is why the class has a module of its own, which is not
compiled: objects of compiled classes cannot be referred to weakly.
"""

from __future__ import annotations

from keyproxy.limits.lease import Lease
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.plan import Plan


class Account:
    """The leases of one pool."""

    __slots__ = ("__weakref__", "leases", "plan", "pool")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.plan = Plan()
        self.leases: dict[str, Lease] = {}
