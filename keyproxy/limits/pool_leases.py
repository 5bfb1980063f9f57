"""The leases of one pool, under its current plan.

They are referenced weakly. The class has its own module, which is not compiled, because mypyc classes do not support weak
references.
"""

from __future__ import annotations

from keyproxy.limits.lease import Lease
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.plan import Plan


class PoolLeases:
    """The leases of one pool, in the order of its plan: one of each measure and selector."""

    __slots__ = ("__weakref__", "all", "plan", "pool")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.plan = Plan()
        #: A tuple, because a dict takes 170 bytes more for each active user.
        self.all: tuple[Lease, ...] = ()

    @property
    def leases(self) -> dict[tuple[str, str], Lease]:
        """By measure and selector."""
        return {(lease.measure, lease.selector): lease for lease in self.all}
