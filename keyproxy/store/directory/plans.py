"""Plans: named sets of limits, assigned to tenants, users and keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from keyproxy.limits.plan import LIMITS, InvalidPlanError, Limit, Plan
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

        `limits`: as `keyproxy.limits.plan.Plan.from_json` reads it. `changed` in the result: the `old` and
        `new` value of each limit that has changed. Raises Invalid.
        """
        return await self._set(name, lambda _: Plan.from_json(limits), if_match)

    async def change(
        self,
        name: str,
        changes: Mapping[str, float | None],
        *,
        limits: Mapping[str, Limit | None] | None = None,
        if_match: str | None = None,
    ) -> Entity:
        """Change the limits that are named; None removes one. The others stay. The plan is created if it does not exist.

        `changes`: by their names in the object of `plans.limits`; `limits`: by `Limit.name`. The result is as for
        `set`. Raises Invalid.
        """
        return await self._set(name, lambda plan: plan.with_names(changes).changed(limits or {}), if_match)

    async def _set(self, name: str, plan_of: Callable[[Plan], Plan], if_match: str | None) -> Entity:
        self._context.require_unbound("set a plan")
        async with self._context.transaction() as transaction:
            before = Plan()
            created = False
            try:
                before = _plan((await self._context.lock(transaction, "plan", name, if_match))["limits"])
            except NotFound:
                if if_match is not None:
                    raise
                row = await transaction.fetch_row("create_plan", name, _stored(_checked(plan_of, before)))
                created = row is not None
                if not created:
                    # Another transaction has created it in the meantime.
                    before = _plan((await self._context.lock(transaction, "plan", name))["limits"])
            plan = _checked(plan_of, before)
            if not created and plan != before:
                await transaction.fetch("set_plan", name, _stored(plan))
        old, new = before.amounts(), plan.amounts()
        changed = {
            limit: {"old": old.get(limit), "new": new.get(limit)}
            for limit in dict.fromkeys([*LIMITS, *old, *new])
            if old.get(limit) != new.get(limit)
        }
        return {**await self.get(name), "created": created, "changed": changed}

    async def get(self, name: str) -> Entity:
        """Return one plan, with its limits and the numbers of its tenants, users and keys."""
        return await self._context.get("plan", name)

    async def list_by_id(self, after: str, limit: int) -> list[Entity]:
        """List plans, ordered by name."""
        return await self._context.list_entities("plan", "plans", after, limit)

    async def delete(self, name: str, *, if_match: str | None = None) -> Entity:
        """Delete a plan. Raises Conflict if it is assigned to a tenant, user or key."""
        self._context.require_unbound("delete a plan")
        try:
            return await self._context.delete("plan", name, if_match)
        except StoreConflict as error:
            if not error.constraint.endswith("plan_id_fkey"):
                raise
            plan = await self.get(name)
            counts = ((kind, plan[f"{kind}s"]) for kind in ("tenant", "user", "key"))
            uses = " and ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts if count)
            raise Conflict(
                f"plan {name!r} is assigned to {uses or 'other objects'}: assign another plan first"
            ) from error


def _plan(limits: object) -> Plan:
    """Read a stored plan. Raises Invalid."""
    try:
        return Plan.from_json(limits)
    except InvalidPlanError as error:
        raise Invalid(f"the stored plan is invalid: {error}") from error


def _checked(plan_of: Callable[[Plan], Plan], before: Plan) -> Plan:
    """Make a plan. Raises Invalid."""
    try:
        return plan_of(before)
    except InvalidPlanError as error:
        raise Invalid(str(error)) from error


def _stored(plan: Plan) -> str:
    """A plan as the JSON of the column `plans.limits`."""
    return json.dumps(plan.to_json())
