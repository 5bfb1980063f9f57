"""Tenants and users: the endpoints."""

from __future__ import annotations

from typing import Final

from keyproxy.admin.endpoints import Answer, Call, Endpoint, page
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.request_models import Paged, TenantChange, TenantCreate, UserChange, UserCreate, UsersQuery
from keyproxy.admin.schemas.response_models import Deleted, Tenant, TenantMade, Tenants, User, UserMade, Users
from keyproxy.admin.scopes import Scope
from keyproxy.store.directory.directory import KeyWish

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})


async def _tenants(call: Call) -> Answer:
    return await page(call.query, call.directory.tenants)


async def _tenant(call: Call) -> Answer:
    tenant = await call.directory.tenant(call.path["id"])
    return Answer(tenant, is_version_of=tenant)


async def _create_tenant(call: Call) -> Answer:
    body: TenantCreate = call.body
    tenant = await call.directory.create_tenant(body.id, body.name, body.plan)
    status = 201 if tenant["created"] else 200
    return Answer(tenant, status, location=f"/v1/tenants/{tenant['id']}", is_version_of=tenant)


async def _change_tenant(call: Call) -> Answer:
    tenant = await call.directory.change_tenant(call.path["id"], call.body.said(), if_match=call.if_match)
    return Answer(tenant, is_version_of=tenant)


async def _delete_tenant(call: Call) -> Answer:
    return Answer(await call.directory.delete_tenant(call.path["id"], if_match=call.if_match))


async def _users(call: Call) -> Answer:
    query: UsersQuery = call.query
    return await page(query, lambda after, limit: call.directory.users(after, limit, query.tenant))


async def _user(call: Call) -> Answer:
    user = await call.directory.user(call.path["id"])
    return Answer(user, is_version_of=user)


async def _create_user(call: Call) -> Answer:
    body: UserCreate = call.body
    wish, warnings = None, []
    if body.key is not None:
        scopes = tuple(dict.fromkeys(body.key.scopes))
        life = call.terms.life(body.key.said())
        wish = KeyWish(name=body.key.name, scopes=scopes, expires_in=life, plan=body.key.plan)
        warnings = call.terms.warnings(scopes)
    user = await call.directory.create_user(body.id, body.tenant, wish, plan=body.plan)
    status = 201 if user["created"] else 200
    content = {**user, "warnings": warnings}
    return Answer(content, status, location=f"/v1/users/{user['id']}", is_version_of=user)


async def _change_user(call: Call) -> Answer:
    user = await call.directory.change_user(call.path["id"], call.body.said(), if_match=call.if_match)
    return Answer(user, is_version_of=user)


async def _delete_user(call: Call) -> Answer:
    return Answer(await call.directory.delete_user(call.path["id"], if_match=call.if_match))


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/tenants", "list_tenants", "List tenants, sorted by id.",
             Scope.KEYS_READ, _tenants, {200: Tenants}, query=Paged),
    Endpoint("POST", "/v1/tenants", "create_tenant",
             "Create a tenant. An existing tenant is left unchanged and returned with status 200.",
             Scope.ADMIN_WRITE, _create_tenant, {201: TenantMade, 200: TenantMade}, body=TenantCreate, is_global=True,
             refuses=_NOT_THERE),
    Endpoint("GET", "/v1/tenants/{id}", "show_tenant", "One tenant.",
             Scope.KEYS_READ, _tenant, {200: Tenant}, refuses=_NOT_THERE),
    Endpoint("PATCH", "/v1/tenants/{id}", "change_tenant",
             "Change a tenant's name or plans, or disable or enable it. Takes effect within a second.",
             Scope.ADMIN_WRITE, _change_tenant, {200: Tenant}, body=TenantChange, is_conditional=True,
             refuses=_NOT_THERE),
    Endpoint("DELETE", "/v1/tenants/{id}", "delete_tenant",
             "Delete a tenant with its users and their keys. The audit log keeps their last state.",
             Scope.ADMIN_WRITE, _delete_tenant, {200: Deleted}, is_global=True, is_conditional=True,
             refuses=_NOT_THERE),
    Endpoint("GET", "/v1/users", "list_users", "List users, sorted by id.",
             Scope.KEYS_READ, _users, {200: Users}, query=UsersQuery),
    Endpoint("POST", "/v1/users", "create_user",
             "Create a user and issue its first live key. An existing user is left unchanged, gets no key, and "
             "is returned with status 200.",
             Scope.USERS_WRITE, _create_user, {201: UserMade, 200: UserMade}, body=UserCreate, refuses=_NOT_THERE),
    Endpoint("GET", "/v1/users/{id}", "show_user", "One user.",
             Scope.KEYS_READ, _user, {200: User}, refuses=_NOT_THERE),
    Endpoint("PATCH", "/v1/users/{id}", "change_user",
             "Change a user's plans, or disable or enable it. Takes effect within a second.",
             Scope.USERS_WRITE, _change_user, {200: User}, body=UserChange, is_conditional=True, refuses=_NOT_THERE),
    Endpoint("DELETE", "/v1/users/{id}", "delete_user",
             "Delete a user with all its keys. The audit log keeps their last state.",
             Scope.USERS_WRITE, _delete_user, {200: Deleted}, is_conditional=True, refuses=_NOT_THERE),
)  # fmt: skip
