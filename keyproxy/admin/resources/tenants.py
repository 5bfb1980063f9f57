"""Tenants and users: the endpoints."""

from __future__ import annotations

from typing import Final

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, Filtered, page
from keyproxy.admin.problems import Problem, Refused
from keyproxy.admin.schemas.request_models import Paged, TenantChange, TenantCreate, UserChange, UserCreate, UsersQuery
from keyproxy.admin.schemas.response_models import Deleted, Tenant, TenantMade, Tenants, User, UserMade, Users
from keyproxy.admin.scopes import Scope
from keyproxy.store.directory.directory import KeyWish

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})


async def _tenants(request: ApiRequest) -> ApiResponse:
    return await page(request.query, request.directory.tenants.list_by_id)


async def _tenant(request: ApiRequest) -> ApiResponse:
    tenant = await request.directory.tenants.get(request.path["id"])
    return ApiResponse(tenant, is_version_of=tenant)


async def _create_tenant(request: ApiRequest) -> ApiResponse:
    body: TenantCreate = request.body
    tenant = await request.directory.tenants.create(body.id, body.name, body.plan)
    status = 201 if tenant["created"] else 200
    return ApiResponse(tenant, status, location=f"/v1/tenants/{tenant['id']}", is_version_of=tenant)


async def _change_tenant(request: ApiRequest) -> ApiResponse:
    if request.is_bound and "roles" in request.body.model_fields_set:
        raise Refused(Problem.TENANT_BOUND, "The token is restricted to a tenant and cannot change its ceiling.")
    tenant = await request.directory.tenants.change(request.path["id"], request.body.given(), if_match=request.if_match)
    return ApiResponse(tenant, is_version_of=tenant)


async def _delete_tenant(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.tenants.delete(request.path["id"], if_match=request.if_match))


async def _users(request: ApiRequest) -> ApiResponse:
    query: UsersQuery = request.query
    return await page(query, lambda after, limit: request.directory.users.list_by_id(after, limit, query.tenant))


async def _user(request: ApiRequest) -> ApiResponse:
    user = await request.directory.users.get(request.path["id"])
    return ApiResponse(user, is_version_of=user)


async def _create_user(request: ApiRequest) -> ApiResponse:
    body: UserCreate = request.body
    wish, warnings = None, []
    if body.key is not None:
        scopes = tuple(dict.fromkeys(body.key.scopes))
        life = request.config.lifetime(body.key.given())
        wish = KeyWish(name=body.key.name, scopes=scopes, expires_in=life, plan=body.key.plan)
        warnings = request.config.warnings(scopes)
    user = await request.directory.users.create(body.id, body.tenant, wish, plan=body.plan)
    status = 201 if user["created"] else 200
    content = {**user, "warnings": [*warnings, *user.get("warnings", [])]}
    return ApiResponse(content, status, location=f"/v1/users/{user['id']}", is_version_of=user)


async def _change_user(request: ApiRequest) -> ApiResponse:
    user = await request.directory.users.change(request.path["id"], request.body.given(), if_match=request.if_match)
    return ApiResponse(user, is_version_of=user)


async def _delete_user(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.users.delete(request.path["id"], if_match=request.if_match))


ENDPOINTS: Final = (
    Endpoint("list_tenants", "List tenants, sorted by id.",
             Scope.KEYS_READ, _tenants, {200: Tenants}, query=Paged),
    Endpoint("create_tenant", "Create a tenant. An existing tenant is left unchanged and returned with status 200.",
             Scope.ADMIN_WRITE, _create_tenant, {201: TenantMade, 200: TenantMade}, body=TenantCreate, is_global=True,
             refuses=_NOT_THERE),
    Endpoint("show_tenant", "One tenant.",
             Scope.KEYS_READ, _tenant, {200: Tenant}, refuses=_NOT_THERE),
    Endpoint("change_tenant", "Change a tenant's name, plans or ceiling, or disable or enable it. Takes effect within a "
             "second.",
             Scope.ADMIN_WRITE, _change_tenant, {200: Tenant}, body=TenantChange, is_conditional=True,
             refuses=_NOT_THERE | {Problem.TENANT_BOUND}),
    Endpoint("delete_tenant", "Delete a tenant with its users and their keys. The audit log keeps their last state.",
             Scope.ADMIN_WRITE, _delete_tenant, {200: Deleted}, is_global=True, is_conditional=True,
             refuses=_NOT_THERE),
    Endpoint("list_users", "List users, sorted by id.",
             Scope.KEYS_READ, _users, {200: Users}, query=UsersQuery, filtered=Filtered("tenant", Scope.USERS_WRITE)),
    Endpoint("create_user",
             "Create a user and issue its first live key. An existing user is left unchanged, gets no key, and "
             "is returned with status 200.",
             Scope.USERS_WRITE, _create_user, {201: UserMade, 200: UserMade}, body=UserCreate, refuses=_NOT_THERE),
    Endpoint("show_user", "One user.",
             Scope.KEYS_READ, _user, {200: User}, refuses=_NOT_THERE),
    Endpoint("change_user", "Change a user's plans or ceiling, or disable or enable it. Takes effect within a second.",
             Scope.USERS_WRITE, _change_user, {200: User}, body=UserChange, is_conditional=True, refuses=_NOT_THERE),
    Endpoint("delete_user", "Delete a user with all its keys. The audit log keeps their last state.",
             Scope.USERS_WRITE, _delete_user, {200: Deleted}, is_conditional=True, refuses=_NOT_THERE),
)  # fmt: skip
