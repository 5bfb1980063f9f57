"""Plans: named sets of limits, assigned to tenants, users and keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from keyproxy.limits.plan import LIMITS, InvalidPlanError, Plan
from keyproxy.store.directory.base import Conflict, DirectoryBase, Entity, Invalid, NotFound
from keyproxy.store.postgres.database import StoreConflict


class Plans(DirectoryBase):
    """The operations on plans. A directory that is bound to a tenant can read plans but not change them."""

    async def set_plan(self, name: str, limits: object, *, if_match: str | None = None) -> Entity:
        """Replace the plan: limits that are not in `limits` are removed. Takes effect within a second.

        `limits`: as `keyproxy.limits.plan.Plan.from_json` reads it. `changed` in the result: the `old` and
        `new` value of each limit that has changed. Raises Invalid.
        """
        return await self._set(name, lambda _: limits, if_match)

    async def change_plan(
        self, name: str, changes: Mapping[str, float | None], *, if_match: str | None = None
    ) -> Entity:
        """Change the limits that are named; None removes one. The others stay. The plan is created if it does not exist.

        The result is as for `set_plan`. Raises Invalid.
        """
        return await self._set(name, lambda before: {**before, **changes}, if_match)

    async def _set(self, name: str, limits_of: Callable[[Entity], object], if_match: str | None) -> Entity:
        self._must_be_unbound("set a plan")
        async with self._acting() as transaction:
            before: Entity = {}
            created = False
            try:
                before = (await self._held(transaction, "plan", name, if_match))["limits"]
            except NotFound:
                if if_match is not None:
                    raise
                row = await transaction.fetch_row("create_plan", name, _checked(limits_of({})))
                created = row is not None
                if not created:
                    # Another transaction has created it in the meantime.
                    before = (await self._held(transaction, "plan", name, None))["limits"]
            limits = json.loads(_checked(limits_of(before)))
            if not created and limits != before:
                await transaction.fetch("set_plan", name, json.dumps(limits))
        changed = {
            limit: {"old": before.get(limit), "new": limits.get(limit)}
            for limit in LIMITS
            if before.get(limit) != limits.get(limit)
        }
        return {**await self.plan(name), "created": created, "changed": changed}

    async def plan(self, name: str) -> Entity:
        """Return one plan, with its limits and the numbers of its tenants, users and keys."""
        return await self._thing("plan", name)

    async def plans(self, after: str, limit: int) -> list[Entity]:
        """List plans, ordered by name."""
        return await self._list("plan", "plans", after, limit)

    async def delete_plan(self, name: str, *, if_match: str | None = None) -> Entity:
        """Delete a plan. Raises Conflict if it is assigned to a tenant, user or key."""
        self._must_be_unbound("delete a plan")
        try:
            return await self._delete("plan", name, if_match)
        except StoreConflict as error:
            if not error.constraint.endswith("plan_id_fkey"):
                raise
            plan = await self.plan(name)
            counts = ((kind, plan[f"{kind}s"]) for kind in ("tenant", "user", "key"))
            given = " and ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts if count)
            raise Conflict(
                f"plan {name!r} is assigned to {given or 'other objects'}: assign another plan first"
            ) from error


def _checked(limits: object) -> str:
    """Validate limits, and return them as the JSON of the column `plans.limits`. Raises Invalid."""
    try:
        return json.dumps(Plan.from_json(limits).to_json())
    except InvalidPlanError as error:
        raise Invalid(str(error)) from error
