"""Roles and owned ids: the models and the endpoints. Both concern all tenants: tokens restricted to one are refused."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, cursor, page, position
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.field_types import Id, KeyScope, Role, Time
from keyproxy.admin.schemas.request_models import Paged, RequestModel
from keyproxy.admin.schemas.response_models import Deleted, Page, ResponseModel
from keyproxy.admin.scopes import Scope

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})


class RoleSet(RequestModel):
    """All scopes of a role; they replace the previous ones."""

    scopes: Annotated[list[KeyScope], Field(max_length=64)]


class OwnedQuery(Paged):
    """Selects owned ids."""

    kind: Role | None = None
    tenant: Id | None = None


class OwnedAdd(RequestModel):
    """The owner of an id."""

    tenant: Id


class OwnedRemove(RequestModel):
    """The expected owner of an id."""

    tenant: Annotated[Id | None, Field(description="Refuse the request if another tenant owns the id.")] = None


class AccessRole(ResponseModel):
    """A named set of scopes, and the numbers of tenants, users and keys that have it."""

    id: str
    scopes: list[str]
    created_at: Time
    tenants: int
    users: int
    keys: int


class AccessRoleMade(AccessRole):
    """A role; `created`: it is new."""

    created: bool


class AccessRoles(Page):
    """Roles, sorted by name."""

    items: list[AccessRole]


class Owned(ResponseModel):
    """An id of the upstream's objects, and the tenant that owns it."""

    kind: str
    id: str
    tenant: str
    created_at: Time


class OwnedMade(Owned):
    """An owned id; `created`: it had no owner before."""

    created: bool


class OwnedDeleted(ResponseModel):
    """An id that no tenant owns any more."""

    kind: str
    id: str
    deleted: Literal[True]


class OwnedPage(Page):
    """Owned ids, sorted by kind and id."""

    items: list[Owned]


async def _roles(request: ApiRequest) -> ApiResponse:
    return await page(request.query, request.directory.roles.list_by_id)


async def _role(request: ApiRequest) -> ApiResponse:
    role = await request.directory.roles.get(request.path["id"])
    return ApiResponse(role, is_version_of=role)


async def _set_role(request: ApiRequest) -> ApiResponse:
    body: RoleSet = request.body
    name = request.path["id"]
    if request.must_exist:
        await request.directory.roles.get(name)
    role = await request.directory.roles.set(name, body.scopes, if_match=request.if_match)
    return ApiResponse(role, 201 if role["created"] else 200, location=f"/v1/roles/{name}", is_version_of=role)


async def _delete_role(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.roles.delete(request.path["id"], if_match=request.if_match))


async def _list_owned(request: ApiRequest) -> ApiResponse:
    query: OwnedQuery = request.query
    found = await request.directory.owned.list_page(
        position(query), query.limit, kind=query.kind, tenant_id=query.tenant
    )
    return ApiResponse({"items": found.items, "next": cursor(query, found.next)})


async def _show_owned(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.owned.get(request.path["kind"], request.path["id"]))


async def _add_owned(request: ApiRequest) -> ApiResponse:
    body: OwnedAdd = request.body
    owned = await request.directory.owned.add(request.path["kind"], request.path["id"], body.tenant)
    return ApiResponse(owned, 201 if owned["created"] else 200)


async def _remove_owned(request: ApiRequest) -> ApiResponse:
    query: OwnedRemove = request.query
    return ApiResponse(await request.directory.owned.remove(request.path["kind"], request.path["id"], query.tenant))


ENDPOINTS: Final = (
    Endpoint("list_roles", "List roles, sorted by name.",
             Scope.KEYS_READ, _roles, {200: AccessRoles}, query=Paged, is_global=True),
    Endpoint("show_role", "One role.",
             Scope.KEYS_READ, _role, {200: AccessRole}, is_global=True, refuses=_NOT_THERE),
    Endpoint("set_role", "Create a role or replace its scopes. Takes effect within a second.",
             Scope.ACCESS_WRITE, _set_role, {201: AccessRoleMade, 200: AccessRoleMade}, body=RoleSet, is_global=True,
             is_conditional=True, refuses=_NOT_THERE),
    Endpoint("delete_role", "Delete a role that no tenant, user or key has.",
             Scope.ACCESS_WRITE, _delete_role, {200: Deleted}, is_global=True, is_conditional=True,
             refuses=_NOT_THERE | {Problem.CONFLICT}),
    Endpoint("list_owned", "List owned ids, sorted by kind and id.",
             Scope.KEYS_READ, _list_owned, {200: OwnedPage}, query=OwnedQuery, is_global=True),
    Endpoint("show_owned", "One owned id.",
             Scope.KEYS_READ, _show_owned, {200: Owned}, is_global=True, refuses=_NOT_THERE),
    Endpoint("add_owned", "Assign an id to a tenant. An id of another tenant is refused. Takes effect within a second.",
             Scope.ACCESS_WRITE, _add_owned, {201: OwnedMade, 200: OwnedMade}, body=OwnedAdd, is_global=True,
             refuses=_NOT_THERE | {Problem.CONFLICT}),
    Endpoint("remove_owned", "Remove an id from its tenant. Takes effect within a second.",
             Scope.ACCESS_WRITE, _remove_owned, {200: OwnedDeleted}, query=OwnedRemove, is_global=True,
             refuses=_NOT_THERE | {Problem.CONFLICT}),
)  # fmt: skip
