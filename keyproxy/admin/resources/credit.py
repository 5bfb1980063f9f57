"""Credits of windows: the models and the endpoint."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.field_types import PRINTABLE, Id, Time
from keyproxy.admin.schemas.request_models import RequestModel
from keyproxy.admin.schemas.response_models import ResponseModel
from keyproxy.admin.scopes import Scope
from keyproxy.limits.plan import LIMIT_MAX
from keyproxy.store.directory.credits import OWNER_KINDS
from keyproxy.store.directory.directory import Credit

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})


class CreditMake(RequestModel):
    """A change to the limit of one window, of exactly one of `tenant`, `user` and `key`."""

    without_default: ClassVar[frozenset[str]] = frozenset(OWNER_KINDS)
    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [kind]} for kind in OWNER_KINDS]})

    tenant: Id = ""
    user: Id = ""
    key: Id = ""
    limit: Annotated[
        str,
        StringConstraints(pattern=PRINTABLE, min_length=1, max_length=600),
        Field(description="A limit of the plan: `tokens/day`, `spend/month@model:gpt-4o`."),
    ]
    amount: Annotated[
        int,
        Field(
            ge=-LIMIT_MAX,
            le=LIMIT_MAX,
            description="Added to the limit of its current window; not 0. `spend` is in micro-units.",
        ),
    ]
    reason: Annotated[str, StringConstraints(pattern=PRINTABLE, min_length=1, max_length=500)]
    is_test: Annotated[bool, Field(description="The window for test traffic.")] = False

    @model_validator(mode="after")
    def _one_owner(self) -> CreditMake:
        if len(self.model_fields_set & set(OWNER_KINDS)) != 1:
            raise ValueError("send exactly one of tenant, user and key")
        return self


class CreditMade(ResponseModel):
    """A credit, and the window as it is now: its limit is `total`, of which `credited` are credits."""

    id: str
    pool_kind: Literal["tenant", "user", "key"]
    pool_id: str
    tenant: str
    mode: Literal["live", "test"]
    limit: str
    amount: int
    reason: str
    credited: int
    total: int
    spent: int
    held: int
    window_starts: Time
    window_ends: Time


async def _credit(request: ApiRequest) -> ApiResponse:
    body: CreditMake = request.body
    (kind,) = body.model_fields_set & set(OWNER_KINDS)
    credit = Credit(kind, getattr(body, kind), body.limit, body.amount, body.reason, body.is_test)
    return ApiResponse(await request.directory.credits.add(credit), 201)


ENDPOINTS: Final = (
    Endpoint("credit_window",
             "Add an amount, which may be negative, to the limit of a current window. It ends with the window. Takes "
             "effect within a second. The audit log has it under `window.credit`.",
             Scope.PLANS_WRITE, _credit, {201: CreditMade}, body=CreditMake, is_global=True, refuses=_NOT_THERE),
)  # fmt: skip
