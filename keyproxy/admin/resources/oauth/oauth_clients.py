"""OAuth clients: the models and the endpoints. They belong to no tenant, so tokens of a tenant are refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, page
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.field_types import ClientId, Id, KeyScope, Name, Time
from keyproxy.admin.schemas.request_models import Paged, RequestModel
from keyproxy.admin.schemas.response_models import Deleted, Page, ResponseModel
from keyproxy.admin.scopes import Scope
from keyproxy.oauth.client import REDIRECT_URIS_MAX, AuthMethod
from keyproxy.store.directory.directory import OAuthClientWish

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})

_Kind = Literal["value", "document", "listed", "registered"]
_Method = Literal["none", "client_secret", "private_key_jwt", "tls_client_auth"]


class OAuthClientCreate(RequestModel):
    """A client to register. With a `user` it gets tokens for that user by itself; with redirect URIs it asks users."""

    client_id: Annotated[ClientId, Field(description="Not `kpc1_`, `https:`, `listed:` or `cli_` and more.")]
    auth_method: _Method
    name: Annotated[Name, Field(description="Default: the client id.")] = ""
    user: Annotated[Id | None, Field(description="The user of its tokens by client_credentials.")] = None
    scopes: Annotated[list[KeyScope], Field(max_length=64, default_factory=list, description="Of these tokens.")]
    is_test: Annotated[bool, Field(description="These tokens are for `oauth.test_resource`.")] = False
    redirect_uris: Annotated[list[str], Field(max_length=REDIRECT_URIS_MAX, default_factory=list)]
    jwks: Annotated[dict[str, Any] | None, Field(description="Public keys, of private_key_jwt.")] = None
    tls_subject: Annotated[str | None, Field(description="Of tls_client_auth: `dns:worker.example.com`.")] = None


class OAuthClientChange(RequestModel):
    """Fields to change. A client that has no row yet gets one when it is disabled."""

    without_default: ClassVar[frozenset[str]] = frozenset({"disabled"})

    disabled: bool = False


class OAuthClientsQuery(Paged):
    """Selects clients."""

    kind: _Kind | None = None


class OAuthClient(ResponseModel):
    """A program that gets tokens. `users`: those for which it gets tokens by itself. `grants`: their number."""

    id: str
    client_id: str
    kind: _Kind
    name: str
    auth_method: _Method
    redirect_uris: list[str]
    jwks: dict[str, Any] | None
    tls_subject: str | None
    disabled_at: Time | None
    created_at: Time
    users: list[str]
    grants: int


class OAuthClientMade(OAuthClient):
    """A registered client."""

    secret: Annotated[
        str | None,
        Field(description="Shown once; null for other methods, and in the response to a repeated request."),
    ]
    warnings: Annotated[list[str], Field(description="Warnings: scopes that no route requires.")]


class OAuthClients(Page):
    """Clients, sorted by id."""

    items: list[OAuthClient]


async def _clients(request: ApiRequest) -> ApiResponse:
    query: OAuthClientsQuery = request.query
    clients = request.directory.oauth_clients
    return await page(query, lambda after, limit: clients.list_by_id(after, limit, kind=query.kind))


async def _create_client(request: ApiRequest) -> ApiResponse:
    body: OAuthClientCreate = request.body
    fields = {**body.model_dump(), "auth_method": AuthMethod(body.auth_method)}
    client = await request.directory.oauth_clients.create(OAuthClientWish(**fields))
    warnings = [] if body.user is None else request.config.warnings(body.scopes, holder="client")
    content = {**client, "warnings": warnings}
    return ApiResponse(content, 201, location=f"/v1/oauth-clients/{client['id']}", is_version_of=client)


async def _client(request: ApiRequest) -> ApiResponse:
    client = await request.directory.oauth_clients.get(request.path["client"])
    return ApiResponse(client, is_version_of=client)


async def _change_client(request: ApiRequest) -> ApiResponse:
    client = await request.directory.oauth_clients.change(
        request.path["client"], request.body.given(), if_match=request.if_match
    )
    return ApiResponse(client, is_version_of=client)


async def _delete_client(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.oauth_clients.delete(request.path["client"], if_match=request.if_match))


ENDPOINTS: Final = (
    Endpoint("list_oauth_clients", "List the OAuth clients that have a row, sorted by id.",
             Scope.OAUTH_READ, _clients, {200: OAuthClients}, query=OAuthClientsQuery, is_global=True),
    Endpoint("create_oauth_client",
             "Register an OAuth client. A client secret is only in this response. With a `user` it gets tokens for that "
             "user by client_credentials.",
             Scope.OAUTH_WRITE, _create_client, {201: OAuthClientMade}, body=OAuthClientCreate, is_global=True,
             refuses=_NOT_THERE),
    Endpoint("show_oauth_client", "One OAuth client, by its id or the id that it presents.",
             Scope.OAUTH_READ, _client, {200: OAuthClient}, is_global=True, refuses=_NOT_THERE),
    Endpoint("change_oauth_client",
             "Disable or enable an OAuth client, by its id or the id that it presents. A disabled one gets no tokens, "
             "and its tokens are refused. Takes effect within a second. One without a row gets one when it is disabled.",
             Scope.OAUTH_WRITE, _change_client, {200: OAuthClient}, body=OAuthClientChange, is_global=True,
             is_conditional=True, refuses=_NOT_THERE),
    Endpoint("delete_oauth_client",
             "Delete an OAuth client with its grants and sessions. One that is not registered gets a new row when a user "
             "consents again: to refuse it, disable it.",
             Scope.OAUTH_WRITE, _delete_client, {200: Deleted}, is_global=True, is_conditional=True, refuses=_NOT_THERE),
)  # fmt: skip
