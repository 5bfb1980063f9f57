"""Plans: named sets of limits, given to tenants, users and keys."""

from __future__ import annotations

import json

from keyproxy.limits.plan import InvalidPlanError, Plan
from keyproxy.store.database import StoreConflict
from keyproxy.store.directory_desk import Conflict, Desk, Entity, Invalid


class Plans(Desk):
    """See the module. Everybody may read them; a desk that is bound to a tenant changes none."""

    async def set_plan(self, name: str, limits: object, *, if_match: str | None = None) -> Entity:
        """Make the plan what `limits` says, all of it: what is not named does not limit. In force within a second.

        `limits`: as `keyproxy.limits.plan.Plan.from_json` reads it. Raises Invalid.
        """
        self._must_be_unbound("set a plan")
        try:
            plan = Plan.from_json(limits)
        except InvalidPlanError as error:
            raise Invalid(str(error)) from error
        async with self._acting() as transaction:
            if if_match is not None:
                await self._held(transaction, "plan", name, if_match)
            row = await transaction.fetch_row("set_plan", name, json.dumps(plan.to_json()))
        return {**await self.plan(name), "created": row is not None and row["created"]}

    async def plan(self, name: str) -> Entity:
        """One plan, with its limits and how many it is given to."""
        return await self._thing("plan", name)

    async def plans(self, after: str, limit: int) -> list[Entity]:
        """Plans in the order of their names."""
        return await self._list("plan", "plans", after, limit)

    async def delete_plan(self, name: str, *, if_match: str | None = None) -> Entity:
        """Delete a plan that nobody has. Raises Conflict if somebody does."""
        self._must_be_unbound("delete a plan")
        try:
            return await self._delete("plan", name, if_match)
        except StoreConflict as error:
            if not error.constraint.endswith("plan_id_fkey"):
                raise
            plan = await self.plan(name)
            counts = ((kind, plan[f"{kind}s"]) for kind in ("tenant", "user", "key"))
            given = " and ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts if count)
            raise Conflict(f"plan {name!r} is given to {given or 'somebody'}: give them another one first") from error
