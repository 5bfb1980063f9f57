"""Approvals of calls and consents to tools: the models and the endpoints."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, cursor, needs, position
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.field_types import AgentId, Id, Reason, Time
from keyproxy.admin.schemas.request_models import Paged, RequestModel
from keyproxy.admin.schemas.response_models import Page, ResponseModel
from keyproxy.admin.scopes import Scope, allows
from keyproxy.ai.tools.tool import ADMIN
from keyproxy.config.tools.tool_settings import consent_warnings
from keyproxy.store.directory.directory import ApprovalFilter, ConsentFilter

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})
_DECIDES: Final = frozenset({Problem.NOT_FOUND, Problem.CONFLICT, Problem.TENANT_BOUND})

_CONSENT_SECONDS_MAX: Final = 366 * 86_400

ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
ConsentSeconds = Annotated[int, Field(ge=1, le=_CONSENT_SECONDS_MAX, description="At most 366 days.")]
Kind = Literal["consent", "human", "admin"]


class ApprovalsQuery(Paged):
    """Selects approvals; all given filters must match."""

    state: Literal["pending", "approved", "denied", "used", "expired"] | None = None
    user: Id | None = None
    tenant: Id | None = None


class ConsentsQuery(Paged):
    """Selects consents; all given filters must match."""

    state: Literal["live", "revoked", "expired"] | None = None
    user: Id | None = None
    tenant: Id | None = None
    tool: ToolName | None = None


class Denial(RequestModel):
    """Why a call is denied."""

    reason: Reason = ""


class ApprovalGrant(Denial):
    """Why a call is approved, and whether that grants a consent to further calls."""

    without_default: ClassVar[frozenset[str]] = frozenset({"consent_for_seconds"})

    consent_for_seconds: Annotated[
        int | None,
        Field(
            ge=1,
            le=_CONSENT_SECONDS_MAX,
            description="Also grant the user's consent to the tool for this agent, for so long. Only for kind `consent`.",
        ),
    ] = None


class ConsentGrant(RequestModel):
    """The consent of a user to a tool."""

    user: Id
    tool: ToolName
    agent: Annotated[AgentId | None, Field(description="The only agent that it is for; null: any.")] = None
    expires_in_seconds: ConsentSeconds


class Approval(ResponseModel):
    """An approval of one call. `summary`: the call as the approver sees it. `call_digest`: what it is bound to."""

    id: str
    state: Literal["pending", "approved", "denied", "used", "expired"]
    kind: Kind
    tool: str
    tenant: str
    user: str
    key: str
    agent: str | None
    client: str | None
    summary: dict[str, Any]
    call_digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    created_at: Time
    expires_at: Time
    decided_at: Time | None
    decided_by: str | None
    reason: str | None
    used_at: Time | None


class ApprovalPage(Page):
    """Approvals, the newest first."""

    items: list[Approval]


class Consent(ResponseModel):
    """The consent of a user to a tool. `agent`: the only one that it is for; null: any."""

    id: str
    state: Literal["live", "revoked", "expired"]
    user: str
    tenant: str
    tool: str
    agent: str | None
    granted_by: str
    created_at: Time
    expires_at: Time
    revoked_at: Time | None


class ConsentGranted(Consent):
    """A granted consent."""

    warnings: Annotated[list[str], Field(description="Warnings: a consent that has no effect.")]


class ApprovalDecided(Approval):
    """A decided approval. `consent`: the one that was granted with it."""

    consent: Consent | None = None


class ConsentPage(Page):
    """Consents, the newest first."""

    items: list[Consent]


async def _list_approvals(request: ApiRequest) -> ApiResponse:
    query: ApprovalsQuery = request.query
    wanted = ApprovalFilter(query.state, query.user, query.tenant)
    found = await request.directory.approvals.list_page(position(query), query.limit, wanted)
    return ApiResponse({"items": found.items, "next": cursor(query, found.next)})


async def _show_approval(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.approvals.get(request.path["id"]))


async def _approve(request: ApiRequest) -> ApiResponse:
    await _require_decider(request)
    body: ApprovalGrant = request.body
    consent_for = None if body.consent_for_seconds is None else timedelta(seconds=body.consent_for_seconds)
    return ApiResponse(
        await request.directory.approvals.approve(request.path["id"], reason=body.reason, consent_for=consent_for)
    )


async def _deny(request: ApiRequest) -> ApiResponse:
    await _require_decider(request)
    return ApiResponse(await request.directory.approvals.deny(request.path["id"], reason=request.body.reason))


async def _require_decider(request: ApiRequest) -> None:
    """Refuse a token without the scope for an approval of this kind, which never changes."""
    approval = await request.directory.approvals.get(request.path["id"])
    if approval["kind"] == ADMIN and not allows(request.token["scopes"], Scope.APPROVALS_ADMIN):
        raise needs(Scope.APPROVALS_ADMIN)


async def _list_consents(request: ApiRequest) -> ApiResponse:
    query: ConsentsQuery = request.query
    wanted = ConsentFilter(query.state, query.user, query.tenant, query.tool)
    found = await request.directory.consents.list_page(position(query), query.limit, wanted)
    return ApiResponse({"items": found.items, "next": cursor(query, found.next)})


async def _show_consent(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.consents.get(request.path["id"]))


async def _grant_consent(request: ApiRequest) -> ApiResponse:
    body: ConsentGrant = request.body
    consent = await request.directory.consents.grant(
        body.user, body.tool, expires_in=timedelta(seconds=body.expires_in_seconds), agent=body.agent
    )
    content = {**consent, "warnings": consent_warnings(request.config.settings.tools, body.tool)}
    return ApiResponse(content, 201, location=f"/v1/consents/{consent['id']}")


async def _revoke_consent(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.consents.revoke(request.path["id"]))


ENDPOINTS: Final = (
    Endpoint("list_approvals", "List approvals of calls, the newest first.",
             Scope.APPROVALS_READ, _list_approvals, {200: ApprovalPage}, query=ApprovalsQuery),
    Endpoint("show_approval", "One approval, with the summary of the call.",
             Scope.APPROVALS_READ, _show_approval, {200: Approval}, refuses=_NOT_THERE),
    Endpoint("approve_call",
             "Approve a pending call. The same request may then be made once, within `approvals.use_seconds`. One of "
             "kind `admin` requires the scope `approvals:admin` on a token without tenant.",
             Scope.APPROVALS_WRITE, _approve, {200: ApprovalDecided}, body=ApprovalGrant, may_be_empty=True,
             refuses=_DECIDES),
    Endpoint("deny_call",
             "Deny a pending call, or withdraw an approval that is not used yet. Repeats of the call are refused for "
             "`approvals.pending_seconds`. One of kind `admin` requires the scope `approvals:admin` on a token without "
             "tenant.",
             Scope.APPROVALS_WRITE, _deny, {200: Approval}, body=Denial, may_be_empty=True, refuses=_DECIDES),
    Endpoint("list_consents", "List consents, the newest first.",
             Scope.APPROVALS_READ, _list_consents, {200: ConsentPage}, query=ConsentsQuery),
    Endpoint("show_consent", "One consent.",
             Scope.APPROVALS_READ, _show_consent, {200: Consent}, refuses=_NOT_THERE),
    Endpoint("grant_consent",
             "Grant the consent of a user to a tool of kind `consent`. It replaces a live one for the same user, tool "
             "and agent. Takes effect within a second.",
             Scope.APPROVALS_WRITE, _grant_consent, {201: ConsentGranted}, body=ConsentGrant,
             refuses=_NOT_THERE | {Problem.CONFLICT}),
    Endpoint("revoke_consent", "Revoke a consent permanently. Takes effect within a second.",
             Scope.APPROVALS_WRITE, _revoke_consent, {200: Consent}, refuses=_NOT_THERE),
)  # fmt: skip
