"""Bind allowances to leases: which lease counts for which limit, under the current plans.

All allowances that name a pool share its leases. If they disagree about its plan, the one that was bound last counts.
"""

from __future__ import annotations

from functools import lru_cache

from keyproxy.limits.allowance import BUNDLES_MAX, Allowance, Bundle, Need, Selection, is_of_mode
from keyproxy.limits.lease import Lease
from keyproxy.limits.lease_sync import LeaseSync
from keyproxy.limits.ledger_protocol import Window
from keyproxy.limits.plan import PER_REQUEST, Limit, Plan
from keyproxy.limits.pool_leases import PoolLeases


class LeaseBinding:
    """The bundles of allowances."""

    def __init__(self, sync: LeaseSync) -> None:
        self._sync = sync

    def bundle(self, allowance: Allowance, need: Need | None, now_mono: float) -> Bundle:
        """The bundle of a request, made if there is none yet."""
        if not allowance.has_selectors:
            return allowance.bundle or self._bind(allowance, ("", ()), now_mono)
        selection = allowance.selection(need)
        return allowance.selected.get(selection) or self._bind(allowance, selection, now_mono)

    def _bind(self, allowance: Allowance, selection: Selection, now_mono: float) -> Bundle:
        """Look up or create all leases of an allowance."""
        pools = []
        for pool, plan in allowance.pools:
            pool_leases = self._sync.leases_of(pool)
            if pool_leases.plan != plan:
                self._replan(pool_leases, plan, now_mono)
            pools.append(pool_leases)
        return _keep(allowance, Bundle(tuple(pools), selection))

    def renewed(self, allowance: Allowance, need: Need | None, now_mono: float) -> Bundle:
        """Return the bundle, with new leases in place of those whose window or holder has ended."""
        bundle = self.bundle(allowance, need, now_mono)
        current = self.current(bundle, now_mono)
        return bundle if current is bundle else _keep(allowance, current)

    def current(self, bundle: Bundle, now_mono: float) -> Bundle:
        """Return a bundle, or its successor if one of its leases has ended: an ended lease cannot be drawn on."""
        for of_pool in bundle.pools:
            for lease in of_pool.all:
                self._sync.expire(lease, now_mono)
            if not all(lease.is_current for lease in of_pool.all):
                of_pool.all = tuple(
                    [lease if lease.is_current else _following(lease, now_mono) for lease in of_pool.all]
                )
        if all(lease.is_current for lease in bundle.leases):
            return bundle
        return Bundle(bundle.pools, bundle.selection)

    def _replan(self, pool_leases: PoolLeases, plan: Plan, now_mono: float) -> None:
        """Switch to another plan: free units were granted under the old one and are returned."""
        pool_leases.plan = plan
        before = pool_leases.leases
        leases = []
        for limit in plan.limits:
            if limit.per == PER_REQUEST or not is_of_mode(limit, pool_leases.pool):
                continue
            key = _key_of(limit)
            lease = before.pop(key, None)
            if lease is None:
                lease = Lease(Window(pool_leases.pool, *key), limit, now_mono)
            else:
                lease.replan(limit)
                if lease.successor is not None:
                    self._sync.retire(lease.successor)
                    lease.successor = None
                lease.empty_until_mono = lease.dry_until_mono = 0.0
                lease.give_back()
                self._sync.reviews.note_change(lease)
            leases.append(lease)
        pool_leases.all = tuple(leases)
        for lease in before.values():
            self._sync.retire(lease)


@lru_cache(maxsize=1_024)
def _key_of(limit: Limit) -> tuple[str, str]:
    """The measure and selector of a limit's window. Shared by the users of a plan: it takes 130 bytes."""
    return limit.window_measure, limit.selector


def _following(lease: Lease, now_mono: float) -> Lease:
    """The lease of the window that follows."""
    successor = lease.successor
    if successor is not None and successor.is_current and now_mono >= successor.begins_mono:
        successor.follow(lease, now_mono)
        return successor
    return Lease(lease.window, lease.rule, now_mono)


def _keep(allowance: Allowance, bundle: Bundle) -> Bundle:
    if not allowance.has_selectors:
        allowance.bundle = bundle
        return bundle
    if len(allowance.selected) >= BUNDLES_MAX and bundle.selection not in allowance.selected:
        allowance.selected.clear()
    allowance.selected[bundle.selection] = bundle
    return bundle
