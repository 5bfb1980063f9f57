"""Responses of the admin API, as the models that generate its OpenAPI document. The store builds the values; tests check
them against these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from keyproxy.admin.schemas.field_types import ActsFor, MoneyUnit, Time


class ResponseModel(BaseModel):
    """The base of all response models."""

    # Only the OpenAPI document needs their validators, which take a tenth of the start of the admin process.
    model_config = ConfigDict(extra="forbid", defer_build=True)


class Tenant(ResponseModel):
    """A customer organisation."""

    id: str
    name: str
    plan: str | None
    test_plan: str | None
    roles: Annotated[list[str] | None, Field(description="The ceiling of all its keys; null: none.")]
    disabled_at: Time | None
    created_at: Time
    users: int


class TenantMade(Tenant):
    """A tenant; `created`: it is new."""

    created: bool


class User(ResponseModel):
    """An account that owns keys."""

    id: str
    tenant: str
    plan: str | None
    test_plan: str | None
    roles: Annotated[list[str] | None, Field(description="The ceiling of all its keys; null: none.")]
    disabled_at: Time | None
    created_at: Time
    keys: int


class Key(ResponseModel):
    """A key. Its secret is not stored."""

    id: str
    user: str
    tenant: str
    state: Literal["active", "retiring", "suspended", "disabled", "expired", "revoked"]
    hint: str
    name: str
    scopes: list[str]
    roles: list[str]
    acts_for: ActsFor
    is_test: bool
    plan: str | None
    created_at: Time
    expires_at: Time | None
    revoked_at: Time | None
    revoke_reason: str | None
    suspended_at: Time | None
    suspend_reason: str | None
    replaces: str | None
    replaced_by: str | None
    last_used_at: Time | None


_Secret = Annotated[
    str | None,
    Field(description="Shown once. null in the response to a repeated request, because it is not stored."),
]
_Warnings = Annotated[list[str], Field(description="Warnings, such as a scope above a ceiling.")]


class KeyMade(Key):
    """A new key, with its secret."""

    secret: _Secret
    warnings: _Warnings


class KeyChanged(Key):
    """A key that was changed."""

    warnings: _Warnings


class FirstKeyMade(Key):
    """The first key of a new user, with its secret."""

    secret: _Secret


class KeyIssued(ResponseModel):
    """One of many keys. `created` is false, and other members are omitted, if the user had a working key of that name."""

    user: str
    name: str
    created: bool
    id: str = ""
    hint: str = ""
    scopes: list[str] = []
    roles: list[str] = []
    acts_for: ActsFor = "none"
    is_test: bool = False
    plan: str | None = None
    expires_at: Time | None = None
    secret: _Secret = None
    reissues: Annotated[str | None, Field(description="The unused key that this one replaces; it is revoked.")] = None


class KeysIssued(ResponseModel):
    """Keys, in the order of the request."""

    items: list[KeyIssued]
    warnings: _Warnings


class KeyRotated(Key):
    """A new key that replaces another, with its secret."""

    secret: _Secret
    old_expires_at: Annotated[Time | None, Field(description="When the key that it `replaces` stops working.")]


class UserMade(User):
    """A user; a new one with its first key."""

    created: bool
    key: FirstKeyMade | None
    warnings: _Warnings


class PlanLimits(ResponseModel):
    """The limits that are set."""

    rate: float | None = None
    burst: int | None = None
    concurrency: int | None = None
    requests_per_day: int | None = None
    requests_per_month: int | None = None
    tokens_per_request: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


class LimitOfPlan(ResponseModel):
    """One limit. `spend` is in micro-units."""

    measure: str
    per: str
    amount: float | int
    burst: int | None = None
    model: str | None = None
    route: str | None = None
    mode: str | None = None


_Limits = Annotated[
    PlanLimits | list[LimitOfPlan],
    Field(description="By name if all limits have one there, else a list."),
]
_Count = Annotated[
    int | None, Field(description="The number of uses; null for a token that is restricted to a tenant.")
]


class Plan(ResponseModel):
    """A named set of limits."""

    id: str
    limits: _Limits
    created_at: Time
    tenants: _Count
    users: _Count
    keys: _Count
    agents: _Count
    grants: _Count


class PlanShown(Plan):
    """A plan, and the label of its amounts of money."""

    money_unit: MoneyUnit


class LimitChanged(ResponseModel):
    """The old and new value of a limit; null: no such limit."""

    old: float | int | None
    new: float | int | None


class PlanMade(Plan):
    """A plan; `created`: it is new. `changed`: the limits whose value has changed: `tokens_per_week@model:gpt-4o`."""

    created: bool
    changed: dict[str, LimitChanged]
    previous: Annotated[PlanLimits | list[LimitOfPlan] | None, Field(description="Its limits before; null: it is new.")]
    warnings: _Warnings


class Prompt(ResponseModel):
    """A prompt template: the category of a system prompt, by the digest of its texts."""

    digest: Annotated[str, Field(description="SHA-256 of the instruction texts, hexadecimal.")]
    category: str
    name: str
    tenant: Annotated[str | None, Field(description="The only tenant that it is registered for; null: all.")]
    created_at: Time


class PromptRegistered(Prompt):
    """A registered prompt template; `created`: it is new."""

    created: bool
    warnings: _Warnings


class PromptRemoved(ResponseModel):
    """A removed prompt template."""

    digest: str
    deleted: Literal[True]


class Deleted(ResponseModel):
    """A deleted object."""

    id: str
    deleted: Literal[True]


class KeysRevoked(ResponseModel):
    """The keys that this request revoked, and the number of matching keys that remain."""

    revoked: list[str]
    remaining: int


class KeysOf(ResponseModel):
    """The matching keys, at most 500."""

    keys: list[Key]


class AuditRow(ResponseModel):
    """One change. `before` and `after` contain no secret."""

    id: int
    at: Time
    actor: str
    origin: str
    db_role: str | None
    action: str
    entity: str
    entity_id: str
    tenant: str | None
    changed: list[str]
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class Token(ResponseModel):
    """The request's token."""

    id: str
    name: str
    state: str
    hint: str
    scopes: list[str]
    tenant: str | None
    created_at: Time | None
    expires_at: Time | None
    revoked_at: Time | None
    last_used_at: Time | None


class Page(ResponseModel):
    """A part of a list."""

    next: Annotated[str | None, Field(description="The `cursor` of the next page; null: this is the last one.")]


class Tenants(Page):
    """Tenants, sorted by id."""

    items: list[Tenant]


class Users(Page):
    """Users, sorted by id."""

    items: list[User]


class Keys(Page):
    """Keys, sorted as requested."""

    items: list[Key]


class Plans(Page):
    """Plans, sorted by name."""

    items: list[Plan]


class Prompts(Page):
    """Prompt templates, sorted by digest."""

    items: list[Prompt]


class AuditRows(Page):
    """Changes, newest first."""

    items: list[AuditRow]


class FieldError(ResponseModel):
    """One validation error."""

    field: str
    detail: str


class ProblemDetails(ResponseModel):
    """RFC 9457. `code` is for programs."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[FieldError] = []
