"""Explanations of requests: the models and the endpoints."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint
from keyproxy.admin.problems import Problem
from keyproxy.admin.resources.usage import Limit, usage_service
from keyproxy.admin.schemas.field_types import BoundValue, CategoryName, MoneyUnit, QueryTokens, Selector, Text
from keyproxy.admin.schemas.request_models import RequestModel
from keyproxy.admin.schemas.response_models import ResponseModel
from keyproxy.admin.scopes import Scope
from keyproxy.limits.plan import LIMIT_MAX
from keyproxy.store.ledger.explain import Question

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})
_ACT_FOR: Final = "The user that the key acts for. Omitted: its owner's request."
_CATEGORY: Final = "Categories that the request declares, or that its template has."
_TOOL: Final = "Name of the tool that it calls, where the route does not name it."
_CERTIFICATE: Final = "A verified certificate of the client is on its connection."
_NAMESPACE: Final = "Values of bound sources that are not in the path, as SOURCE=VALUE."


class ExplainTokenQuery(RequestModel):
    """The request of an agent token to explain."""

    method: Annotated[str, StringConstraints(pattern=r"^[A-Z]{1,20}$")] = "POST"
    path: Annotated[
        str,
        StringConstraints(pattern=r"^(/[!-~]{0,999})?$"),
        Field(description="Omitted: only the credential and its limits are explained."),
    ] = ""
    tokens: Annotated[QueryTokens | None, Field(description="Maximum tokens of prompt and response.")] = None
    model: Annotated[Selector, Field(description="The model.")] = ""
    category: Annotated[list[CategoryName], Field(description=_CATEGORY, max_length=64, default_factory=list)]
    namespace: Annotated[list[BoundValue], Field(description=_NAMESPACE, max_length=64, default_factory=list)]
    tool: Annotated[Selector, Field(description=_TOOL)] = ""
    client_certificate: Annotated[bool, Field(description=_CERTIFICATE)] = False


class ExplainQuery(ExplainTokenQuery):
    """The request of a key to explain."""

    act_for: Annotated[Text | None, Field(description=_ACT_FOR)] = None


class ExplainTokenBody(RequestModel):
    """The request of an agent token to explain, with its body."""

    method: Annotated[str, StringConstraints(pattern=r"^[A-Z]{1,20}$")] = "POST"
    path: Annotated[str, StringConstraints(pattern=r"^/[!-~]{0,999}$")]
    tokens: Annotated[int | None, Field(ge=0, le=LIMIT_MAX, description="Where no body is read: maximum tokens.")] = (
        None
    )
    model: Annotated[Selector, Field(description="Replaces the model that the body names.")] = ""
    category: Annotated[list[CategoryName], Field(description=_CATEGORY, max_length=64, default_factory=list)]
    namespace: Annotated[list[BoundValue], Field(description=_NAMESPACE, max_length=64, default_factory=list)]
    tool: Annotated[Selector, Field(description=_TOOL)] = ""
    client_certificate: Annotated[bool, Field(description=_CERTIFICATE)] = False
    body: Annotated[str, Field(max_length=1 << 20, description="The body, as text.")]


class ExplainBody(ExplainTokenBody):
    """The request of a key to explain, with its body."""

    without_default: ClassVar[frozenset[str]] = frozenset({"act_for"})

    act_for: Annotated[Text | None, Field(description=_ACT_FOR)] = None


class JudgedCategory(ResponseModel):
    """A category of the request's prompt, and the kind of source that names it."""

    name: str
    source: str


class JudgedBind(ResponseModel):
    """A bind of the route: the source of its value, its rule with its text, and whether it holds."""

    value: str
    rule: str
    text: str
    holds: bool


class ChainLink(ResponseModel):
    """An agent token of the chain: its scopes and budgets, and what the ceiling of its agent allows."""

    agent: str
    token: str
    scopes: list[str]
    ceiling: Annotated[list[str] | None, Field(description="The scopes that it allows; null: there is none.")]
    token_budget: int | None
    request_budget: int | None


class Explained(ResponseModel):
    """Whether the request would be accepted. Nothing was charged or sent.

    For a body on a route that counts tokens: the `model`, the `input` and `output` that it reserves, the `cap` that is
    inserted, and the `price` of the reservation in micro-units.
    """

    key: Annotated[str, Field(description="The key; for an agent token, the one that it was cut from.")]
    user: Annotated[str, Field(description="The user that the request concerns.")]
    tenant: str
    mode: Literal["live", "test"]
    actor: Annotated[str | None, Field(description="The owner of the key, if it acts for the user.")]
    agent: str | None
    agent_token: str | None
    key_scopes: list[str]
    roles: list[str]
    user_ceiling: Annotated[list[str] | None, Field(description="The scopes that it allows; null: there is none.")]
    actor_ceiling: Annotated[list[str] | None, Field(description="The scopes that it allows; null: there is none.")]
    tenant_ceiling: Annotated[list[str] | None, Field(description="The scopes that it allows; null: there is none.")]
    chain: Annotated[list[ChainLink], Field(description="The agent token and those that it was cut from.")]
    effective_scopes: Annotated[list[str], Field(description="What the credential may do.")]
    route: str | None
    allowed: bool
    code: str | None
    status: int | None
    policy: str | None
    detail: str | None
    retry_after_seconds: int | None
    model: str | None
    input: int | None
    output: int | None
    cap: int | None
    price: int | None
    money_unit: MoneyUnit
    missing_scope: Annotated[str | None, Field(description="The smallest scope that the refused request lacks.")]
    tool: Annotated[str | None, Field(description="The tool that the request calls.")]
    approval: Annotated[str | None, Field(description="What a call of the tool needs: none, consent, human or admin.")]
    missing: Annotated[str | None, Field(description="What the credential lacks to call the tool.")]
    categories: list[JudgedCategory]
    binds: list[JudgedBind]
    limits: list[Limit]


def _bound_values(given: list[str]) -> tuple[tuple[str, str], ...]:
    parts = [one.partition("=") for one in given]
    return tuple([(source, value) for source, _, value in parts])


def _question(asked: ExplainTokenQuery | ExplainTokenBody) -> Question:
    return Question(
        asked.method, asked.path, asked.tokens, asked.model,
        # JSON may contain half of a surrogate pair, which other encodings cannot represent.
        body=asked.body.encode("utf-8", "replace") if isinstance(asked, ExplainTokenBody) else None,
        categories=tuple(asked.category),
        namespaces=_bound_values(asked.namespace),
        tool=asked.tool,
        has_certificate=asked.client_certificate,
        act_for=asked.act_for if isinstance(asked, ExplainQuery | ExplainBody) else None,
    )  # fmt: skip


async def _explain(request: ApiRequest) -> ApiResponse:
    key = request.path["id"]
    await request.directory.keys.get(key)  # 404 for tokens that may not see it
    question = _question(request.body or request.query)
    return ApiResponse(await usage_service(request).explained(key, question) | request.config.labels)


async def _explain_token(request: ApiRequest) -> ApiResponse:
    token = request.path["id"]
    await request.directory.agent_tokens.get(token)  # 404 for tokens that may not see it
    question = _question(request.body or request.query)
    return ApiResponse(await usage_service(request).explained_token(token, question) | request.config.labels)


ENDPOINTS: Final = (
    Endpoint("explain_key",
             "Explain whether a request with this key would be accepted, and the state of each limit. Charges nothing.",
             Scope.USAGE_READ, _explain, {200: Explained}, query=ExplainQuery, refuses=_NOT_THERE),
    Endpoint("explain_request",
             "As explain_key, of a request with a body: also what it reserves, and the output cap that is inserted.",
             Scope.USAGE_READ, _explain, {200: Explained}, body=ExplainBody, refuses=_NOT_THERE),
    Endpoint("explain_agent_token",
             "Explain whether a request with this agent token would be accepted, and the state of each limit. Charges "
             "nothing.",
             Scope.USAGE_READ, _explain_token, {200: Explained}, query=ExplainTokenQuery, refuses=_NOT_THERE),
    Endpoint("explain_agent_token_request", "As explain_agent_token, of a request with a body.",
             Scope.USAGE_READ, _explain_token, {200: Explained}, body=ExplainTokenBody, refuses=_NOT_THERE),
)  # fmt: skip
