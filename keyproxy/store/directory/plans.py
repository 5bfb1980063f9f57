"""Plans: named sets of limits, assigned to tenants, users and keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from keyproxy.limits.plan import NO_LIMITS, InvalidPlanError, Plan
from keyproxy.limits.plans.plan_changes import changed_plan, named_amounts
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import Entity
from keyproxy.store.directory.errors import Conflict, Invalid, NotFound
from keyproxy.store.postgres.database import StoreConflict


@dataclass(frozen=True, slots=True)
class PlanStore:
    """The operations on plans. A directory that is bound to a tenant can read plans but not change them."""

    _context: DirectoryContext

    async def set(self, name: str, limits: object, *, if_match: str | None = None) -> Entity:
        """Replace the plan: limits that are not in `limits` are removed. Takes effect within a second.

        `limits`: as `keyproxy.limits.plan.Plan.from_json` reads it. In the result, `previous` has the limits before the
        change, and `changed` the `old` and `new` value of those that have changed. Raises Invalid.
        """
        return await self._set(name, lambda _: Plan.from_json(limits), if_match)

    async def change(self, name: str, changes: object, *, if_match: str | None = None) -> Entity:
        """Change the limits that are named. The others stay. The plan is created if it does not exist.

        `changes`: as `limits.plans.plan_changes.changed_plan` reads it. The result is as for `set`. Raises Invalid.
        """
        return await self._set(name, lambda before: changed_plan(Plan.from_json(before), changes), if_match)

    async def _set(self, name: str, plan_after: Callable[[object], Plan], if_match: str | None) -> Entity:
        self._context.require_unbound("set a plan")
        before: object = {}
        async with self._context.transaction() as transaction:
            created = False
            try:
                before = (await self._context.lock(transaction, "plan", name, if_match))["limits"]
            except NotFound:
                if if_match is not None:
                    raise
                first = _valid(lambda: plan_after({}))
                row = await transaction.fetch_row("create_plan", name, json.dumps(first.to_json()))
                created = row is not None
                if not created:
                    # Another transaction has created it in the meantime.
                    before = (await self._context.lock(transaction, "plan", name))["limits"]
            after = _valid(lambda: plan_after(before))
            if not created and after.to_json() != before:
                await transaction.fetch("set_plan", name, json.dumps(after.to_json()))
        was, now = named_amounts(_readable(before)), named_amounts(after)
        changed = {
            limit: {"old": was.get(limit), "new": now.get(limit)}
            for limit in dict.fromkeys((*was, *now))
            if was.get(limit) != now.get(limit)
        }
        plan = await self.get(name)
        return {**plan, "created": created, "changed": changed, "previous": None if created else before}

    async def get(self, name: str) -> Entity:
        """Return one plan, with its limits and the numbers of its tenants, users, keys, agents and grants."""
        return await self._context.get("plan", name)

    async def list_by_id(self, after: str, limit: int) -> list[Entity]:
        """List plans, ordered by name."""
        return await self._context.list_entities("plan", "plans", after, limit)

    async def delete(self, name: str, *, if_match: str | None = None) -> Entity:
        """Delete a plan. Raises Conflict if it is assigned to a tenant, user, key, agent or grant."""
        self._context.require_unbound("delete a plan")
        try:
            return await self._context.delete("plan", name, if_match)
        except StoreConflict as error:
            if not error.constraint.endswith("plan_id_fkey"):
                raise
            plan = await self.get(name)
            counts = ((kind, plan[f"{kind}s"]) for kind in ("tenant", "user", "key", "agent", "grant"))
            uses = " and ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts if count)
            raise Conflict(
                f"plan {name!r} is assigned to {uses or 'other objects'}: assign another plan first"
            ) from error


def _valid(plan: Callable[[], Plan]) -> Plan:
    """The plan. Raises Invalid for an InvalidPlanError."""
    try:
        return plan()
    except InvalidPlanError as error:
        raise Invalid(str(error)) from error


def _readable(limits: object) -> Plan:
    """A plan from the table; without limits if another SQL client wrote them in no known form."""
    try:
        return Plan.from_json(limits)
    except InvalidPlanError:
        return NO_LIMITS
