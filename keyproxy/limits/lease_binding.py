"""Bind allowances to leases: which lease counts for which limit, under the current plans.

All allowances that name a pool share its leases. If they disagree about its plan, the one that was bound last counts.
"""

from __future__ import annotations

from keyproxy.limits.allowance import Allowance, Bundle
from keyproxy.limits.lease import Lease
from keyproxy.limits.lease_sync import LeaseSync
from keyproxy.limits.ledger_protocol import Window
from keyproxy.limits.plan import PER_REQUEST, Plan
from keyproxy.limits.pool_leases import PoolLeases


class LeaseBinding:
    """The bundles of allowances."""

    def __init__(self, sync: LeaseSync) -> None:
        self._sync = sync

    def bind(self, allowance: Allowance, now_mono: float) -> Bundle:
        """Look up or create all leases of an allowance. Return its new bundle."""
        pools = []
        for pool, plan in allowance.pools:
            pool_leases = self._sync.leases_of(pool)
            if pool_leases.plan != plan:
                self._replan(pool_leases, plan, now_mono)
            pools.append(pool_leases)
        bundle = allowance.bundle = Bundle(tuple(pools))
        return bundle

    def renewed(self, allowance: Allowance, now_mono: float) -> Bundle:
        """Return the bundle, with new leases in place of those whose window or holder has ended."""
        bundle = allowance.bundle
        if bundle is None:
            bundle = self.bind(allowance, now_mono)
        for of_pool in bundle.pools:
            self.renew(of_pool, now_mono)
        if not all(lease.is_current for lease in (*bundle.units, *bundle.budgets)):
            bundle = allowance.bundle = Bundle(bundle.pools)
        return bundle

    def renew(self, pool_leases: PoolLeases, now_mono: float) -> None:
        """Replace the leases of a pool whose window or holder has ended."""
        for measure, lease in pool_leases.leases.items():
            self._sync.expire(lease, now_mono)
            if not lease.is_current:
                pool_leases.leases[measure] = Lease(lease.window, lease.rule, now_mono)

    def _replan(self, pool_leases: PoolLeases, plan: Plan, now_mono: float) -> None:
        """Switch to another plan: free units were granted under the old one and are returned."""
        pool_leases.plan = plan
        before, pool_leases.leases = pool_leases.leases, {}
        for limit in plan.limits:
            if limit.per == PER_REQUEST:
                continue
            measure = limit.window_measure
            lease = before.pop(measure, None)
            if lease is None:
                lease = Lease(Window(pool_leases.pool, measure), limit, now_mono)
            else:
                lease.replan(limit)
                lease.empty_until_mono = 0.0
                lease.give_back()
                self._sync.reviews.note_change(lease)
            pool_leases.leases[measure] = lease
        for lease in before.values():
            self._sync.retire(lease)
