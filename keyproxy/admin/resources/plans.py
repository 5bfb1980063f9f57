"""Plans, the audit log, and the caller's own token: the endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import orjson

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, ApiStream, Endpoint, cursor, page, position
from keyproxy.admin.problems import Problem, Refused
from keyproxy.admin.schemas import response_models
from keyproxy.admin.schemas.request_models import (
    AuditExportQuery,
    AuditPageQuery,
    AuditQuery,
    Paged,
    PlanChange,
    PlanSet,
)
from keyproxy.admin.schemas.response_models import AuditRow, AuditRows, Deleted, PlanMade, Plans, Token
from keyproxy.admin.scopes import Scope
from keyproxy.limits.plan import Plan
from keyproxy.limits.plans.plan_changes import plan_warnings
from keyproxy.store.directory.directory import AuditFilter, Entity, NotFound

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})
_COUNTS: Final = dict.fromkeys(("tenants", "users", "keys", "agents", "grants"))
_EXPORT_PAGE: Final = 500


async def _plans(request: ApiRequest) -> ApiResponse:
    async def listed(after: str, limit: int) -> list[Entity]:
        return [_shown(request, plan) for plan in await request.directory.plans.list_by_id(after, limit)]

    return await page(request.query, listed)


async def _plan(request: ApiRequest) -> ApiResponse:
    plan = await request.directory.plans.get(request.path["id"])
    return ApiResponse(_shown(request, plan) | request.config.labels, is_version_of=plan)


async def _set_plan(request: ApiRequest) -> ApiResponse:
    body: PlanSet = request.body
    name = request.path["id"]
    if request.must_exist:
        await request.directory.plans.get(name)
    if request.must_be_new:
        try:
            await request.directory.plans.get(name)
        except NotFound:
            pass
        else:
            raise Refused(Problem.OUTDATED, f"Plan {name!r} already exists.")
    plan = await request.directory.plans.set(name, body.limits_json(), if_match=request.if_match)
    if request.must_be_new and not plan["created"]:
        # A concurrent request created it first; the transaction rolls back.
        raise Refused(Problem.OUTDATED, f"Plan {name!r} already exists.")
    return _changed(name, plan)


async def _change_plan(request: ApiRequest) -> ApiResponse:
    body: PlanChange = request.body
    name = request.path["id"]
    if request.must_exist:
        await request.directory.plans.get(name)
    plan = await request.directory.plans.change(name, body.changes(), if_match=request.if_match)
    return _changed(name, plan)


def _changed(name: str, plan: Entity) -> ApiResponse:
    content = {**plan, "warnings": plan_warnings(Plan.from_json(plan["limits"]))}
    return ApiResponse(content, 201 if plan["created"] else 200, location=f"/v1/plans/{name}", is_version_of=plan)


async def _delete_plan(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.plans.delete(request.path["id"], if_match=request.if_match))


def _shown(request: ApiRequest, plan: Entity) -> Entity:
    """Hide the number of a plan's uses from a token that is restricted to a tenant."""
    return {**plan, **_COUNTS} if request.is_bound else plan


async def _audit(request: ApiRequest) -> ApiResponse:
    query: AuditPageQuery = request.query
    found = await request.directory.audit.list_newest(position(query), query.limit, _wanted(query))
    return ApiResponse({"items": found.items, "next": cursor(query, found.next)})


async def _export(request: ApiRequest) -> ApiStream:
    query: AuditExportQuery = request.query
    horizon = await request.directory.audit.horizon()

    async def lines() -> AsyncIterator[bytes]:
        last = str(query.after)
        while items := (
            await request.directory.audit.export(last, _EXPORT_PAGE, _wanted(query), horizon=horizon)
        ).items:
            yield b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in items)
            last = str(items[-1]["id"])

    return ApiStream(lines())


def _wanted(query: AuditQuery) -> AuditFilter:
    return AuditFilter(
        entity=query.entity,
        entity_id=query.entity_id,
        tenant=query.tenant,
        actor=query.actor,
        action=query.action,
        since=query.since,
        until=query.until,
        db_role=query.db_role,
    )


async def _token(request: ApiRequest) -> ApiResponse:
    return ApiResponse(request.token)


ENDPOINTS: Final = (
    Endpoint("list_plans", "List plans, sorted by name.",
             Scope.KEYS_READ, _plans, {200: Plans}, query=Paged),
    Endpoint("show_plan", "One plan.",
             Scope.KEYS_READ, _plan, {200: response_models.PlanShown}, refuses=_NOT_THERE),
    Endpoint("set_plan", "Create or replace a plan: limits that are not named are removed. Takes effect within a "
             "second.",
             Scope.PLANS_WRITE, _set_plan, {201: PlanMade, 200: PlanMade}, body=PlanSet, is_global=True,
             is_conditional=True, may_be_new_only=True, refuses=_NOT_THERE),
    Endpoint("change_plan",
             "Change the limits that are named, by name or as a list of entries; null removes one, the others stay. "
             "Creates the plan if it is missing. Takes effect within a second.",
             Scope.PLANS_WRITE, _change_plan, {201: PlanMade, 200: PlanMade}, body=PlanChange, is_global=True,
             is_conditional=True, refuses=_NOT_THERE),
    Endpoint("delete_plan", "Delete a plan that no tenant, user or key uses.",
             Scope.PLANS_WRITE, _delete_plan, {200: Deleted}, is_global=True, is_conditional=True,
             refuses=_NOT_THERE | {Problem.CONFLICT}),
    Endpoint("list_audit", "List changes, newest first.",
             Scope.AUDIT_READ, _audit, {200: AuditRows}, query=AuditPageQuery),
    Endpoint("export_audit",
             "Stream changes as lines of JSON, oldest first, complete up to now. To resume, set `after` to the "
             "last row's id. A response that ends without its last chunk is incomplete.",
             Scope.AUDIT_READ, _export, {200: AuditRow}, query=AuditExportQuery,
             refuses=frozenset({Problem.CONFLICT})),
    Endpoint("show_token", "Show the request's token: its scopes and its expiry.",
             None, _token, {200: Token}),
)  # fmt: skip
