"""Bodies and queries of the admin API: the models that validate them and generate its OpenAPI document.

Strict: no unknown fields, no numbers written as text, no control characters. Fields are described once, here.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    Tag,
    model_validator,
)

from keyproxy.admin.schemas.field_types import (
    AS_LIST,
    BY_NAME,
    ActsFor,
    Amount,
    AuditedId,
    Burst,
    CategoryName,
    Id,
    Instant,
    KeyScope,
    Life,
    Measure,
    Name,
    Pasted,
    Per,
    PlanId,
    QueryBoolean,
    QueryLimit,
    QueryRow,
    QuerySeconds,
    Reason,
    Role,
    Selector,
    Text,
    Whole,
    limits_form,
)
from keyproxy.limits.plan import LIMIT_MAX, LIMITS, LIMITS_MAX


class RequestModel(BaseModel):
    """The base of all request models."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    #: Fields whose absence differs from their default value: OpenAPI omits the default.
    without_default: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name in cls.without_default:
            schema["properties"].get(name, {}).pop("default", None)
        return schema

    def given(self) -> dict[str, Any]:
        """The fields that the request contains, with any value."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


class Paged(RequestModel):
    """A part of a list."""

    cursor: Annotated[str, Field(max_length=1000, description="`next` of the previous page.")] = ""
    limit: Annotated[QueryLimit, Field(description="Maximum number of items.")] = 100


class UsersQuery(Paged):
    """Selects users."""

    tenant: Annotated[Id | None, Field(description="Only this tenant.")] = None


class KeysQuery(Paged):
    """Selects keys; all given filters must match."""

    user: Id | None = None
    tenant: Id | None = None
    is_test: QueryBoolean | None = None
    state: Literal["active", "retiring", "suspended", "disabled", "expired", "revoked"] | None = None
    older_than_seconds: Annotated[QuerySeconds | None, Field(description="Issued longer ago than this.")] = None
    unused_seconds: Annotated[QuerySeconds | None, Field(description="Neither used nor issued within this time.")] = (
        None
    )
    expires_within_seconds: Annotated[
        QuerySeconds | None, Field(description="Expired, or expiring within this time.")
    ] = None
    sort: Annotated[
        Literal["id", "created", "used", "expires"], Field(description="Sort by id, or by a time, oldest first.")
    ] = "id"


class AuditQuery(RequestModel):
    """Selects audit log rows; all given filters must match."""

    entity: (
        Literal[
            "tenant", "user", "key", "plan", "token", "window", "role", "owned", "template", "agent", "agent_token",
            "approval", "consent", "provider_key", "network", "oauth_client", "oauth_grant", "oauth_session",
            "oauth_subject",
        ]
        | None
    ) = None  # fmt: skip
    entity_id: AuditedId | None = None
    tenant: Id | None = None
    actor: Text | None = None
    action: Literal["insert", "update", "delete", "truncate", "window.credit", "anomaly"] | None = None
    since: Annotated[Instant | None, Field(description="Start, inclusive.")] = None
    until: Annotated[Instant | None, Field(description="Before that.")] = None
    db_role: Annotated[Text | None, Field(description="Only changes by this login role of the database.")] = None


class AuditPageQuery(AuditQuery, Paged):
    """Selects audit log rows, in pages."""


class AuditExportQuery(AuditQuery):
    """Selects audit log rows for an export."""

    after: Annotated[QueryRow, Field(description="Only rows with an id greater than this.")] = 0


class NoQuery(RequestModel):
    """For endpoints without query parameters."""


class TenantCreate(RequestModel):
    """A tenant to create."""

    id: Id
    name: Name = ""
    plan: PlanId | None = None


#: Roles of a tenant or user.
_Ceiling = Annotated[
    Annotated[list[Role], Field(max_length=16)] | None,
    Field(description="The ceiling of its keys: the scopes of these roles. []: nothing is allowed. null: no ceiling."),
]


class TenantChange(RequestModel):
    """Fields to change; omitted fields stay unchanged. A null plan removes the plan."""

    without_default: ClassVar[frozenset[str]] = frozenset({"name", "plan", "test_plan", "roles", "disabled"})

    name: Name = ""
    plan: PlanId | None = None
    test_plan: PlanId | None = None
    roles: _Ceiling = None
    disabled: bool = False


class FirstKey(RequestModel):
    """The first key of a new user."""

    without_default: ClassVar[frozenset[str]] = frozenset({"expires_in_seconds"})

    name: Name = ""
    scopes: Annotated[list[KeyScope], Field(max_length=64)] = []
    expires_in_seconds: Annotated[
        Life | None, Field(description="null: never expires. Default: `keys.age_days_max`.")
    ] = None
    plan: PlanId | None = None


class UserCreate(RequestModel):
    """A user with its first live key."""

    without_default: ClassVar[frozenset[str]] = frozenset({"key"})

    id: Id
    tenant: Id
    plan: PlanId | None = None
    key: Annotated[FirstKey | None, Field(description="Default: {}. null: no key.")] = FirstKey()


class UserChange(RequestModel):
    """Fields to change; omitted fields stay unchanged. A null plan removes the plan."""

    without_default: ClassVar[frozenset[str]] = frozenset({"plan", "test_plan", "roles", "disabled"})

    plan: PlanId | None = None
    test_plan: PlanId | None = None
    roles: _Ceiling = None
    disabled: bool = False


class KeyIssue(FirstKey):
    """A key of a user."""

    user: Id
    is_test: bool = False
    roles: Annotated[list[Role], Field(max_length=16)] = []
    acts_for: ActsFor = "none"


class KeysIssue(RequestModel):
    """Keys of users, all of them or none."""

    keys: Annotated[list[KeyIssue], Field(min_length=1, max_length=1000)]
    reissue_unseen: Annotated[
        bool, Field(description="Revoke and reissue keys that were never used, because their secrets were lost.")
    ] = False


class KeyChange(RequestModel):
    """Fields to change; omitted fields stay unchanged. A null plan removes the plan."""

    without_default: ClassVar[frozenset[str]] = frozenset({"name", "plan", "scopes", "roles", "acts_for"})

    name: Name = ""
    plan: PlanId | None = None
    scopes: Annotated[list[KeyScope], Field(max_length=64, description="All scopes; replace the previous ones.")] = []
    roles: Annotated[list[Role], Field(max_length=16, description="All roles; replace the previous ones.")] = []
    acts_for: ActsFor = "none"


class KeyRotate(RequestModel):
    """How to replace a key."""

    without_default: ClassVar[frozenset[str]] = frozenset({"expires_in_seconds"})

    grace_seconds: Annotated[int, Field(ge=0, le=3_153_600_000, description="How long the old key keeps working.")] = (
        86_400
    )
    expires_in_seconds: Annotated[
        Life | None, Field(description="The new key's lifetime. Default: `keys.age_days_max`. null: never expires.")
    ] = None


class KeyRevoke(RequestModel):
    """The reason for a revocation."""

    reason: Reason = ""


class KeySuspend(RequestModel):
    """The reason for a suspension."""

    reason: Reason = ""


class KeysRevoke(RequestModel):
    """Selects keys to revoke; all given filters must match, and at least one is required."""

    user: Id | None = None
    tenant: Id | None = None
    older_than_seconds: Annotated[Life | None, Field(description="Issued longer ago than this.")] = None
    unused_seconds: Annotated[Life | None, Field(description="Neither used nor issued within this time.")] = None
    reason: Reason = ""
    limit: Annotated[int, Field(ge=1, le=1000, description="Maximum number of keys to revoke in one request.")] = 1000
    dry_run: Annotated[bool, Field(description="Revoke nothing; `remaining` is the number of matching keys.")] = False


class LeakReport(RequestModel):
    """A leaked key or token: either itself or its SHA-256."""

    without_default: ClassVar[frozenset[str]] = frozenset({"key", "digest"})
    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["key"]}, {"required": ["digest"]}]})

    key: Annotated[str, StringConstraints(pattern=r"^[!-~]{8,4096}$"), Field(description="The key.")] = ""
    digest: Annotated[
        str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$"), Field(description="The key's SHA-256, hexadecimal.")
    ] = ""
    reason: Reason = "leaked"

    @model_validator(mode="after")
    def _one_of_the_two(self) -> LeakReport:
        if ("key" in self.model_fields_set) == ("digest" in self.model_fields_set):
            raise ValueError("send either key or digest")
        return self


class LeakText(RequestModel):
    """A text that may contain keys."""

    text: Pasted
    reason: Reason = "leaked"


class KeyQuestion(RequestModel):
    """A text with a key in it; or the id, hint or name of a key, or its first part."""

    text: Pasted


class Limits(RequestModel):
    """The limits of a plan. An omitted or null limit does not apply."""

    rate: Annotated[
        float | None, Field(ge=1 / 86_400, le=1_000_000, allow_inf_nan=False, description="Requests per second.")
    ] = None
    burst: Annotated[int | None, Field(ge=1, le=LIMIT_MAX, description="Burst size in requests; requires a rate.")] = (
        None
    )
    concurrency: Annotated[Whole | None, Field(description="Requests in flight.")] = None
    requests_per_day: Whole | None = None
    requests_per_month: Whole | None = None
    tokens_per_request: Whole | None = None
    tokens_per_day: Whole | None = None
    tokens_per_month: Whole | None = None


class LimitEntry(RequestModel):
    """One limit. `spend` is in micro-units. Without `model`, `route` and `mode` it applies to every request."""

    without_default: ClassVar[frozenset[str]] = frozenset({"per", "burst", "model", "route", "mode"})

    measure: Measure
    per: Annotated[Per, Field(description="A calendar period, or `request`. Of a rate: its interval.")] = ""
    amount: Amount
    burst: Annotated[Burst | None, Field(description="Of a rate; null: its default.")] = None
    model: Annotated[Selector, Field(description="Only requests for this model.")] = ""
    route: Annotated[Selector, Field(description="Only requests on this route.")] = ""
    mode: Annotated[Literal["live", "test", ""], Field(description="Only requests with such keys.")] = ""


class PlanSet(RequestModel):
    """A complete plan; replaces all previous limits."""

    limits: Annotated[
        Annotated[Limits, Tag(BY_NAME)] | Annotated[list[LimitEntry], Tag(AS_LIST), Field(max_length=LIMITS_MAX)],
        Discriminator(limits_form),
    ]

    def limits_json(self) -> object:
        """The limits in the form of `plans.limits`."""
        if isinstance(self.limits, Limits):
            return self.limits.model_dump(exclude_none=True)
        return [entry.model_dump(exclude_none=True) for entry in self.limits]


class PromptRegister(RequestModel):
    """A prompt template to register, or to change."""

    without_default: ClassVar[frozenset[str]] = frozenset({"name"})

    category: Annotated[CategoryName, Field(description="The category of prompts with these instructions.")]
    name: Annotated[Name | None, Field(description="A descriptive name; null or omitted: unchanged.")] = None
    tenant: Annotated[Id | None, Field(description="The only tenant that it is registered for; null: all.")] = None


class LimitChanges(Limits):
    """Limits to change. null removes one; limits that are not given stay as they are."""

    without_default: ClassVar[frozenset[str]] = frozenset(LIMITS)


class LimitChange(LimitEntry):
    """A limit to set; an `amount` of null removes it. Omitted members stay, so a burst can be changed alone."""

    without_default: ClassVar[frozenset[str]] = frozenset({"amount", "per", "burst", "model", "route", "mode"})

    amount: Amount | None = None  # type: ignore[assignment]


class PlanChange(RequestModel):
    """Changes to a plan."""

    limits: Annotated[
        Annotated[LimitChanges, Tag(BY_NAME)]
        | Annotated[list[LimitChange], Tag(AS_LIST), Field(max_length=LIMITS_MAX)],
        Discriminator(limits_form),
    ]

    def changes(self) -> object:
        """The changes, as `changed_plan` reads them."""
        if isinstance(self.limits, LimitChanges):
            return self.limits.given()
        return [entry.given() for entry in self.limits]
