"""Plans, the audit log, and the caller's own token: the endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import orjson

from keyproxy.admin.endpoints import Answer, Call, Endpoint, Stream, cursor, page, position
from keyproxy.admin.problems import Problem, Refused
from keyproxy.admin.schemas.request_models import (
    AuditExportQuery,
    AuditPageQuery,
    AuditQuery,
    Paged,
    PlanChange,
    PlanSet,
)
from keyproxy.admin.schemas.response_models import AuditRow, AuditRows, Deleted, Plan, PlanMade, Plans, Token
from keyproxy.admin.scopes import Scope
from keyproxy.store.directory.directory import AuditFilter, Entity, NotFound

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})
_COUNTS: Final = dict.fromkeys(("tenants", "users", "keys"))
_EXPORT_PAGE: Final = 500


async def _plans(call: Call) -> Answer:
    async def listed(after: str, limit: int) -> list[Entity]:
        return [_shown(call, plan) for plan in await call.directory.plans(after, limit)]

    return await page(call.query, listed)


async def _plan(call: Call) -> Answer:
    plan = await call.directory.plan(call.path["id"])
    return Answer(_shown(call, plan), is_version_of=plan)


async def _set_plan(call: Call) -> Answer:
    body: PlanSet = call.body
    name = call.path["id"]
    if call.must_be_there:
        await call.directory.plan(name)
    if call.must_be_new:
        try:
            await call.directory.plan(name)
        except NotFound:
            pass
        else:
            raise Refused(Problem.OUTDATED, f"Plan {name!r} already exists.")
    plan = await call.directory.set_plan(name, body.limits.model_dump(exclude_none=True), if_match=call.if_match)
    if call.must_be_new and not plan["created"]:
        # A concurrent request created it first; the transaction rolls back.
        raise Refused(Problem.OUTDATED, f"Plan {name!r} already exists.")
    return Answer(plan, 201 if plan["created"] else 200, location=f"/v1/plans/{name}", is_version_of=plan)


async def _change_plan(call: Call) -> Answer:
    body: PlanChange = call.body
    name = call.path["id"]
    if call.must_be_there:
        await call.directory.plan(name)
    plan = await call.directory.change_plan(name, body.limits.said(), if_match=call.if_match)
    return Answer(plan, 201 if plan["created"] else 200, location=f"/v1/plans/{name}", is_version_of=plan)


async def _delete_plan(call: Call) -> Answer:
    return Answer(await call.directory.delete_plan(call.path["id"], if_match=call.if_match))


def _shown(call: Call, plan: Entity) -> Entity:
    """Hide the number of a plan's uses from a token that is restricted to a tenant."""
    return {**plan, **_COUNTS} if call.is_bound else plan


async def _audit(call: Call) -> Answer:
    query: AuditPageQuery = call.query
    found = await call.directory.audit(position(query), query.limit, _wanted(query))
    return Answer({"items": found.items, "next": cursor(query, found.next)})


async def _export(call: Call) -> Stream:
    query: AuditExportQuery = call.query
    horizon = await call.directory.audit_horizon()

    async def lines() -> AsyncIterator[bytes]:
        last = str(query.after)
        while items := (await call.directory.audit_export(last, _EXPORT_PAGE, _wanted(query), horizon=horizon)).items:
            yield b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in items)
            last = str(items[-1]["id"])

    return Stream(lines())


def _wanted(query: AuditQuery) -> AuditFilter:
    return AuditFilter(
        query.entity, query.entity_id, query.tenant, query.actor, query.action, query.since, query.until
    )  # fmt: skip


async def _token(call: Call) -> Answer:
    return Answer(call.token)


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/plans", "list_plans", "List plans, sorted by name.",
             Scope.KEYS_READ, _plans, {200: Plans}, query=Paged),
    Endpoint("GET", "/v1/plans/{id}", "show_plan", "One plan.",
             Scope.KEYS_READ, _plan, {200: Plan}, refuses=_NOT_THERE),
    Endpoint("PUT", "/v1/plans/{id}", "set_plan",
             "Create or replace a plan: limits that are not named are removed. Takes effect within a "
             "second.",
             Scope.PLANS_WRITE, _set_plan, {201: PlanMade, 200: PlanMade}, body=PlanSet, is_global=True,
             is_conditional=True, may_be_new_only=True, refuses=_NOT_THERE),
    Endpoint("PATCH", "/v1/plans/{id}", "change_plan",
             "Change the limits that are named; null removes one, the others stay. Creates the plan if it is missing. "
             "Takes effect within a second.",
             Scope.PLANS_WRITE, _change_plan, {201: PlanMade, 200: PlanMade}, body=PlanChange, is_global=True,
             is_conditional=True, refuses=_NOT_THERE),
    Endpoint("DELETE", "/v1/plans/{id}", "delete_plan", "Delete a plan that no tenant, user or key uses.",
             Scope.PLANS_WRITE, _delete_plan, {200: Deleted}, is_global=True, is_conditional=True,
             refuses=_NOT_THERE | {Problem.CONFLICT}),
    Endpoint("GET", "/v1/audit", "list_audit", "List changes, newest first.",
             Scope.AUDIT_READ, _audit, {200: AuditRows}, query=AuditPageQuery),
    Endpoint("GET", "/v1/audit/export", "export_audit",
             "Stream changes as lines of JSON, oldest first, complete up to now. To resume, set `after` to the "
             "last row's id. A response that ends without its last chunk is incomplete.",
             Scope.AUDIT_READ, _export, {200: AuditRow}, query=AuditExportQuery, is_stream=True,
             refuses=frozenset({Problem.CONFLICT})),
    Endpoint("GET", "/v1/token", "show_token", "Show the request's token: its scopes and its expiry.",
             None, _token, {200: Token}),
)  # fmt: skip
