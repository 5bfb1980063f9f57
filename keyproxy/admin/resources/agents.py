"""Agents and agent tokens: the models and the endpoints."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, page
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.field_types import PRINTABLE, AgentId, Id, KeyScope, PlanId, Role, Time, Whole
from keyproxy.admin.schemas.leak_models import AgentTokenShown
from keyproxy.admin.schemas.request_models import KeyRevoke, Paged, RequestModel
from keyproxy.admin.schemas.response_models import Page, ResponseModel
from keyproxy.admin.scopes import Scope

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})
_REFUSED: Final = frozenset({Problem.NOT_FOUND, Problem.DELEGATION_REFUSED, Problem.QUOTA_EXHAUSTED})

#: The longest life of a token that any configuration allows.
_LIFE_SECONDS_MAX: Final = 900


class AgentTokenWish(RequestModel):
    """An agent token to mint: with the scopes of a role as far as the key has them, or with all of these scopes."""

    without_default: ClassVar[frozenset[str]] = frozenset({"role", "scopes", "ttl_seconds", "audience", "act_for"})
    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["role"]}, {"required": ["scopes"]}]})

    agent: Annotated[AgentId, Field(description="The agent of the user; created by its first token.")]
    role: Role = ""
    scopes: Annotated[list[KeyScope], Field(min_length=1, max_length=64, default_factory=list)]
    token_budget: Annotated[Whole | None, Field(description="How many tokens of models it may use; null: any.")] = None
    request_budget: Annotated[Whole | None, Field(description="How many requests it may make; null: any.")] = None
    ttl_seconds: Annotated[
        int, Field(ge=1, le=_LIFE_SECONDS_MAX, description="Default and maximum: `access.agent_ttl_seconds`.")
    ] = 0
    audience: Annotated[
        str,
        StringConstraints(pattern=PRINTABLE, min_length=1, max_length=500),
        Field(description="One of `access.audiences`. Default: the first of them."),
    ] = ""
    act_for: Annotated[Id, Field(description="The user that the key acts for. Default: its owner.")] = ""

    @model_validator(mode="after")
    def _role_or_scopes(self) -> AgentTokenWish:
        if ("role" in self.model_fields_set) == ("scopes" in self.model_fields_set):
            raise ValueError("send either role or scopes")
        return self


class AgentChange(RequestModel):
    """Fields to change; omitted fields stay unchanged. A null plan removes the plan."""

    without_default: ClassVar[frozenset[str]] = frozenset({"plan", "roles", "disabled"})

    plan: PlanId | None = None
    roles: Annotated[
        Annotated[list[Role], Field(max_length=16)] | None,
        Field(description="The ceiling of its tokens: the scopes of these roles. []: nothing is allowed. null: none."),
    ] = None
    disabled: bool = False


class Agent(ResponseModel):
    """An agent of a user. `tokens`: the number of its live tokens."""

    id: str
    user: str
    tenant: str
    roles: Annotated[list[str] | None, Field(description="The ceiling of its tokens; null: there is none.")]
    plan: str | None
    disabled_at: Time | None
    created_at: Time
    tokens: int


class Agents(Page):
    """Agents, sorted by id."""

    items: list[Agent]


class AgentTokenMinted(ResponseModel):
    """A new agent token."""

    id: str
    token: Annotated[
        str, Field(description="Shown once. Omitted in the response to a repeated request, because it is not stored.")
    ] = ""
    agent: str
    user: str
    tenant: str
    scopes: list[str]
    token_budget: int | None
    request_budget: int | None
    audience: str
    is_test: bool
    depth: int
    expires_at: Time


class AgentRevoked(ResponseModel):
    """The number of tokens of an agent that this request revoked."""

    agent: str
    user: str
    revoked: int


async def _mint(request: ApiRequest) -> ApiResponse:
    body: AgentTokenWish = request.body
    wish = body.given()
    act_for = wish.pop("act_for", None)
    minted = await request.directory.agent_tokens.mint(request.path["id"], wish, act_for=act_for)
    return ApiResponse(minted, 201, location=f"/v1/agent-tokens/{minted['id']}")


async def _token(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.agent_tokens.get(request.path["id"]))


async def _revoke_token(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.agent_tokens.revoke(request.path["id"], request.body.reason))


async def _agents(request: ApiRequest) -> ApiResponse:
    user = request.path["id"]
    return await page(request.query, lambda after, limit: request.directory.agents.list_by_id(user, after, limit))


async def _agent(request: ApiRequest) -> ApiResponse:
    agent = await request.directory.agents.get(request.path["id"], request.path["agent"])
    return ApiResponse(agent, is_version_of=agent)


async def _change(request: ApiRequest) -> ApiResponse:
    agent = await request.directory.agents.change(
        request.path["id"], request.path["agent"], request.body.given(), if_match=request.if_match
    )
    return ApiResponse(agent, is_version_of=agent)


async def _revoke(request: ApiRequest) -> ApiResponse:
    path, body = request.path, request.body
    return ApiResponse(await request.directory.agents.revoke_tokens(path["id"], path["agent"], body.reason))


ENDPOINTS: Final = (
    Endpoint("mint_agent_token",
             "Mint a token for an agent from a key, which needs no scope for this. The agent is created by its first "
             "token. The token is only in this response.",
             Scope.KEYS_WRITE, _mint, {201: AgentTokenMinted}, body=AgentTokenWish, signs=True, refuses=_REFUSED),
    Endpoint("show_agent_token", "One agent token.",
             Scope.KEYS_READ, _token, {200: AgentTokenShown}, refuses=_NOT_THERE),
    Endpoint("revoke_agent_token",
             "Revoke an agent token permanently, and thereby those minted from it. Takes effect within a second.",
             Scope.KEYS_WRITE, _revoke_token, {200: AgentTokenShown}, body=KeyRevoke, may_be_empty=True,
             refuses=_NOT_THERE),
    Endpoint("list_agents", "List the agents of a user, sorted by id.",
             Scope.KEYS_READ, _agents, {200: Agents}, query=Paged, refuses=_NOT_THERE),
    Endpoint("show_agent", "One agent.",
             Scope.KEYS_READ, _agent, {200: Agent}, refuses=_NOT_THERE),
    Endpoint("change_agent",
             "Change an agent's ceiling or plan, or disable or enable it. The tokens of a disabled agent, and those "
             "minted from them, are refused, and it gets no new ones. Takes effect within a second.",
             Scope.KEYS_WRITE, _change, {200: Agent}, body=AgentChange, is_conditional=True, refuses=_NOT_THERE),
    Endpoint("revoke_agent",
             "Revoke all live tokens of an agent, and thereby those minted from them. Takes effect within a second.",
             Scope.KEYS_WRITE, _revoke, {200: AgentRevoked}, body=KeyRevoke, may_be_empty=True, refuses=_NOT_THERE),
)  # fmt: skip
