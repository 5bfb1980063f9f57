"""Provider keys: the models and the endpoints. No response has a secret."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Final, Literal

from pydantic import Field, SecretStr

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, page
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.field_types import Id, Life, Time
from keyproxy.admin.schemas.request_models import Paged, RequestModel
from keyproxy.admin.schemas.response_models import Deleted, Page, ResponseModel
from keyproxy.admin.scopes import Scope

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})

_PROVIDER: Final = r"^[A-Za-z0-9_.\-]{1,128}$"
_SECRET_CHARACTERS_MAX: Final = 8_192
_DAY_SECONDS: Final = 86_400

_Provider = Annotated[str, Field(pattern=_PROVIDER, description="A configured provider with `sealed = true`.")]
_Secret = Annotated[
    SecretStr,
    Field(min_length=1, max_length=_SECRET_CHARACTERS_MAX, description="One line of visible ASCII. Never returned."),
]
_Check = Annotated[
    bool,
    Field(
        description="Send a request with the secret to the upstream first. After a 401, or without a response, nothing is"
        " stored."
    ),
]


class ProviderKeyWish(RequestModel):
    """A secret to store."""

    provider: _Provider
    secret: _Secret
    tenant: Annotated[Id | None, Field(description="The only tenant that it is for; null: all without one.")] = None
    is_test: bool = False
    check: _Check = False


class ProviderKeyRotate(RequestModel):
    """The secret that replaces another."""

    secret: _Secret
    grace_seconds: Annotated[Life | Literal[0], Field(description="How long the old one stays usable.")] = _DAY_SECONDS
    check: _Check = False


class ProviderKeysQuery(Paged):
    """Selects provider keys."""

    provider: Annotated[str | None, Field(pattern=_PROVIDER)] = None
    tenant: Id | None = None


class ProviderKey(ResponseModel):
    """A stored credential of an upstream, without its secret."""

    id: str
    provider: str
    tenant: str | None
    is_test: bool
    state: Literal["scheduled", "active", "ending", "ended", "revoked"]
    hint: Annotated[str, Field(description="The last four characters of the secret; empty for a short one.")]
    sealed_with: Annotated[str, Field(description="The name of the key in `secrets.key_file`.")]
    starts_at: Time
    ends_at: Time | None
    revoked_at: Time | None
    checked_at: Time | None
    check_status: Annotated[int | None, Field(description="The status of the upstream's response to the check.")]
    created_at: Time


class ProviderKeyRotated(ProviderKey):
    """The new provider key, and the one that it replaces."""

    replaces: str
    old_ends_at: Time | None


class ProviderKeys(Page):
    """Provider keys, sorted by id."""

    items: list[ProviderKey]


class Resealed(ResponseModel):
    """The rows that were sealed with the newest key, and those that do not open."""

    sealed_with: str
    resealed: int
    failed: list[str]


async def _list(request: ApiRequest) -> ApiResponse:
    query: ProviderKeysQuery = request.query
    keys = request.directory.provider_keys
    return await page(
        query, lambda after, limit: keys.list_by_id(after, limit, provider=query.provider, tenant_id=query.tenant)
    )


async def _add(request: ApiRequest) -> ApiResponse:
    body: ProviderKeyWish = request.body
    made = await request.directory.provider_keys.add(
        body.provider, body.secret.get_secret_value(), tenant_id=body.tenant, is_test=body.is_test, check=body.check
    )
    return ApiResponse(made, 201, location=f"/v1/provider-keys/{made['id']}")


async def _show(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.provider_keys.get(request.path["id"]))


async def _rotate(request: ApiRequest) -> ApiResponse:
    body: ProviderKeyRotate = request.body
    made = await request.directory.provider_keys.rotate(
        request.path["id"],
        body.secret.get_secret_value(),
        grace=timedelta(seconds=body.grace_seconds),
        check=body.check,
    )
    return ApiResponse(made, 201, location=f"/v1/provider-keys/{made['id']}")


async def _revoke(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.provider_keys.revoke(request.path["id"]))


async def _delete(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.provider_keys.delete(request.path["id"]))


async def _reseal(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.provider_keys.reseal())


class _Nothing(RequestModel):
    """No fields."""


ENDPOINTS: Final = (
    Endpoint("list_provider_keys", "List provider keys, sorted by id.",
             Scope.PROVIDERS_READ, _list, {200: ProviderKeys}, query=ProviderKeysQuery),
    Endpoint("add_provider_key",
             "Store a secret of a provider, sealed. It is used within a second; older ones stay usable.",
             Scope.PROVIDERS_WRITE, _add, {201: ProviderKey}, body=ProviderKeyWish, refuses=_NOT_THERE),
    Endpoint("show_provider_key", "One provider key.",
             Scope.PROVIDERS_READ, _show, {200: ProviderKey}, refuses=_NOT_THERE),
    Endpoint("rotate_provider_key",
             "Replace a provider key by one with another secret. The old one stays usable for the grace period.",
             Scope.PROVIDERS_WRITE, _rotate, {201: ProviderKeyRotated}, body=ProviderKeyRotate, refuses=_NOT_THERE),
    Endpoint("revoke_provider_key",
             "Revoke a provider key permanently, within a second. While a tenant has only unusable ones, its requests "
             "are refused: the shared one is not used.",
             Scope.PROVIDERS_WRITE, _revoke, {200: ProviderKey}, body=_Nothing, may_be_empty=True, refuses=_NOT_THERE),
    Endpoint("delete_provider_key",
             "Delete a provider key. Without the last one of a tenant, its requests use the shared one again.",
             Scope.PROVIDERS_WRITE, _delete, {200: Deleted}, refuses=_NOT_THERE),
    Endpoint("reseal_provider_keys", "Seal all provider keys with the newest key of `secrets.key_file`.",
             Scope.PROVIDERS_WRITE, _reseal, {200: Resealed}, body=_Nothing, may_be_empty=True, is_global=True),
)  # fmt: skip
