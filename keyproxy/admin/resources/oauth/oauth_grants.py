"""OAuth grants and sessions: the models and the endpoints."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, page
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.field_types import Id, PlanId, Time
from keyproxy.admin.schemas.request_models import Paged, RequestModel
from keyproxy.admin.schemas.response_models import Deleted, Page, ResponseModel
from keyproxy.admin.scopes import Scope

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})


class OAuthGrantChange(RequestModel):
    """Fields to change. A null plan removes the plan."""

    without_default: ClassVar[frozenset[str]] = frozenset({"plan"})

    plan: PlanId | None = None


class OAuthGrant(ResponseModel):
    """What a user, or an operator for a service, has allowed a client. `sessions`: their number."""

    id: str
    user: str
    tenant: str
    client: Annotated[str, Field(description="The id of the client.")]
    client_name: str
    resource: str
    scopes: list[str]
    is_test: bool
    is_service: bool
    plan: str | None
    granted_at: Time
    sessions: int


class OAuthGrants(Page):
    """Grants, sorted by id."""

    items: list[OAuthGrant]


class OAuthSessionShown(ResponseModel):
    """A client on one device. `via_key`, or `via_issuer` and `via_subject`: how the user signed in."""

    id: str
    grant: str
    user: str
    tenant: str
    client: Annotated[str, Field(description="The id of the client.")]
    client_name: str
    presented_as: Annotated[str, Field(description="The id that the client presented.")]
    scopes: list[str]
    is_test: bool
    via_key: str | None
    via_issuer: str | None
    via_subject: str | None
    created_at: Time
    expires_at: Time
    last_used_at: Time | None


class OAuthSessions(Page):
    """Sessions, sorted by id."""

    items: list[OAuthSessionShown]


class SessionsQuery(Paged):
    """Selects sessions."""

    user: Id | None = None


class GrantsRevoke(RequestModel):
    """Selects the grants to revoke."""

    user: Id


class SessionsRevoke(RequestModel):
    """Selects the sessions to end. null: those of all users that the token covers."""

    user: Id | None


class OAuthRevoked(ResponseModel):
    """How many this request has ended, at most 1000, and how many remain, counted up to 10000: repeat it while not 0."""

    revoked: int
    remaining: int


async def _grants(request: ApiRequest) -> ApiResponse:
    return await page(request.query, request.directory.oauth_grants.list_by_id)


async def _grants_of_user(request: ApiRequest) -> ApiResponse:
    grants, user = request.directory.oauth_grants, request.path["id"]
    return await page(request.query, lambda after, limit: grants.list_by_id(after, limit, user_id=user))


async def _grant(request: ApiRequest) -> ApiResponse:
    grant = await request.directory.oauth_grants.get(request.path["id"])
    return ApiResponse(grant, is_version_of=grant)


async def _change_grant(request: ApiRequest) -> ApiResponse:
    grant = await request.directory.oauth_grants.change(
        request.path["id"], request.body.given(), if_match=request.if_match
    )
    return ApiResponse(grant, is_version_of=grant)


async def _delete_grant(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.oauth_grants.delete(request.path["id"], if_match=request.if_match))


async def _revoke_grants(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.oauth_grants.delete_of_user(request.body.user))


async def _sessions(request: ApiRequest) -> ApiResponse:
    query: SessionsQuery = request.query
    sessions = request.directory.oauth_sessions
    return await page(query, lambda after, limit: sessions.list_by_id(after, limit, user_id=query.user))


async def _session(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.oauth_sessions.get(request.path["id"]))


async def _delete_session(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.oauth_sessions.delete(request.path["id"]))


async def _revoke_sessions(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.oauth_sessions.delete_many(user_id=request.body.user))


ENDPOINTS: Final = (
    Endpoint("list_grants", "List grants, sorted by id.",
             Scope.OAUTH_READ, _grants, {200: OAuthGrants}, query=Paged),
    Endpoint("list_grants_of_user", "List the grants of a user, sorted by id.",
             Scope.OAUTH_READ, _grants_of_user, {200: OAuthGrants}, query=Paged, refuses=_NOT_THERE),
    Endpoint("revoke_grants", "Revoke grants of a user with their sessions, at most 1000: see `remaining`.",
             Scope.OAUTH_WRITE, _revoke_grants, {200: OAuthRevoked}, body=GrantsRevoke, refuses=_NOT_THERE),
    Endpoint("show_grant", "One grant.",
             Scope.OAUTH_READ, _grant, {200: OAuthGrant}, refuses=_NOT_THERE),
    Endpoint("change_grant", "Set or remove the plan of a grant, which limits all its tokens together.",
             Scope.OAUTH_WRITE, _change_grant, {200: OAuthGrant}, body=OAuthGrantChange, is_conditional=True,
             refuses=_NOT_THERE),
    Endpoint("delete_grant",
             "Revoke a grant with its sessions: its tokens are refused within a second. The user can consent again.",
             Scope.OAUTH_WRITE, _delete_grant, {200: Deleted}, is_conditional=True, refuses=_NOT_THERE),
    Endpoint("list_sessions", "List OAuth sessions, sorted by id.",
             Scope.OAUTH_READ, _sessions, {200: OAuthSessions}, query=SessionsQuery, refuses=_NOT_THERE),
    Endpoint("show_session", "One OAuth session.",
             Scope.OAUTH_READ, _session, {200: OAuthSessionShown}, refuses=_NOT_THERE),
    Endpoint("delete_session", "End an OAuth session: its tokens are refused within a second.",
             Scope.OAUTH_WRITE, _delete_session, {200: Deleted}, refuses=_NOT_THERE),
    Endpoint("revoke_sessions", "End OAuth sessions, at most 1000: see `remaining`.",
             Scope.OAUTH_WRITE, _revoke_sessions, {200: OAuthRevoked}, body=SessionsRevoke, refuses=_NOT_THERE),
)  # fmt: skip
