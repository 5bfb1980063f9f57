"""The handling of a request to the admin API: authenticate, validate, execute in one transaction, respond.

A request that changes something is one transaction that includes its audit rows and, with an Idempotency-Key, the stored
response: all or nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson
from aiohttp import web

from keyproxy.admin import request_parsing
from keyproxy.admin.authentication import Access
from keyproxy.admin.endpoints import ApiConfig, ApiRequest, ApiResponse, ApiStream, Endpoint, needs
from keyproxy.admin.problems import Problem, Refused
from keyproxy.admin.resources import (
    access,
    agents,
    approvals,
    credit,
    explain,
    importing,
    keys,
    plans,
    prompts,
    provider_keys,
    tenants,
    usage,
)
from keyproxy.admin.resources.oauth import oauth_clients, oauth_grants, oauth_subjects
from keyproxy.admin.scopes import Scope, allows
from keyproxy.auth.api_key import KeyFormat
from keyproxy.store.directory.agents.operator_mint import SigningMint
from keyproxy.store.directory.directory import (
    Actor,
    Conflict,
    DelegationRefused,
    Directory,
    DirectoryError,
    Entity,
    Invalid,
    NotFound,
    NotPermitted,
    Outdated,
    TooManyTokens,
    etag,
)
from keyproxy.store.directory.idempotent_requests import (
    IdempotencyRecord,
    InProgress,
    KeyReused,
    StoredResponse,
    respond_once,
)
from keyproxy.store.directory.provider_keys.provider_keys import SecretHandler
from keyproxy.store.postgres.database import (
    Database,
    JoinedTransaction,
    StatementRunner,
    StoreConflict,
    StoreUnavailable,
)

_log = logging.getLogger(__name__)

ENDPOINTS: Final = (
    *tenants.ENDPOINTS,
    *keys.ENDPOINTS,
    *agents.ENDPOINTS,
    *approvals.ENDPOINTS,
    *importing.ENDPOINTS,
    *plans.ENDPOINTS,
    *access.ENDPOINTS,
    *prompts.ENDPOINTS,
    *provider_keys.ENDPOINTS,
    *oauth_clients.ENDPOINTS,
    *oauth_grants.ENDPOINTS,
    *oauth_subjects.ENDPOINTS,
    *usage.ENDPOINTS,
    *explain.ENDPOINTS,
    *credit.ENDPOINTS,
)

_DIRECTORY_PROBLEMS: Final = {
    NotFound: Problem.NOT_FOUND,
    Invalid: Problem.INVALID,
    Conflict: Problem.CONFLICT,
    Outdated: Problem.OUTDATED,
    NotPermitted: Problem.TENANT_BOUND,
    DelegationRefused: Problem.DELEGATION_REFUSED,
    TooManyTokens: Problem.QUOTA_EXHAUSTED,
}
_SECRETS: Final = ("secret",)

#: Members that the response to a repeated request omits: the plaintext of an agent token.
_OMITTED: Final = ("token",)

#: The id of the request's token, once it is authenticated.
TOKEN_ID: Final = web.RequestKey("token_id", str)


@dataclass(frozen=True, slots=True)
class Service:
    """Serves requests under one configuration."""

    database: Database
    key_format: KeyFormat
    access: Access
    config: ApiConfig
    mint: SigningMint
    secrets: SecretHandler
    now_mono: Callable[[], float]

    async def respond(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        """Respond to a request. Raises Refused, StoreUnavailable."""
        peer = request.remote or "unix"
        token = await self.authorize(
            request, endpoint.scope, is_global=endpoint.is_global, or_scope=endpoint.scope_of_filter(request.query)
        )
        raw, body = await request_parsing.body_of(request, endpoint)
        wanted = request_parsing.if_match(request) if endpoint.is_conditional else None
        valid = _ValidRequest(
            token=token,
            path=request_parsing.path_of(request),
            body=body,
            query=request_parsing.query_of(request, endpoint.query),
            if_match=None if wanted == "*" else wanted,
            must_exist=wanted == "*",
            must_be_new=request_parsing.must_be_new(request, endpoint),
            actor=Actor(f"token:{token['id']}", peer),
        )
        try:
            if endpoint.signs:
                await self.mint.key.prepare()
            if endpoint.method == "GET":
                return await self._read(endpoint, request, valid)
            return await self._changed(endpoint, request, valid, raw)
        except DirectoryError as error:
            problem = _DIRECTORY_PROBLEMS[type(error)]
            if problem is Problem.NOT_FOUND and wanted is not None and endpoint.method == "PUT":
                problem = Problem.OUTDATED
            raise Refused(problem, _sentence(str(error))) from error
        except StoreConflict as error:
            _log.warning("the database refused a change that validation allows: %s", error.constraint or error)
            raise Refused(Problem.CONFLICT, "The database refused the change.") from error

    async def authorize(
        self, request: web.Request, scope: Scope | None, *, is_global: bool, or_scope: Scope | None = None
    ) -> Entity:
        """Authenticate a request and require this scope, or the other one. Raises Refused, StoreUnavailable."""
        authorization = request.headers.getall("Authorization", [])
        token = await self.access.token(authorization, request.remote or "unix", self.now_mono())
        request[TOKEN_ID] = token["id"]
        sufficient = [one for one in (scope, or_scope) if one is not None]
        if scope is not None and not any(allows(token["scopes"], one) for one in sufficient):
            raise needs(scope)
        if is_global and token["tenant"] is not None:
            raise Refused(Problem.TENANT_BOUND)
        return token

    async def _read(self, endpoint: Endpoint, request: web.Request, valid: _ValidRequest) -> web.StreamResponse:
        result = await endpoint.handler(valid.in_transaction(self, self.database))
        if isinstance(result, ApiStream):
            return await _streamed(request, result)
        return _response(_stored(result))

    async def _changed(
        self, endpoint: Endpoint, request: web.Request, valid: _ValidRequest, raw: bytes
    ) -> web.StreamResponse:
        async def work(joined: StatementRunner) -> StoredResponse:
            result = await endpoint.handler(valid.in_transaction(self, joined))
            if isinstance(result, ApiStream):
                raise TypeError(f"{endpoint.name} changes something and streams")
            return _stored(result)

        key = request_parsing.idempotency_key(request, endpoint)
        if key is None:
            async with self.database.transaction() as transaction:
                stored = await work(JoinedTransaction(transaction))
            return _response(stored)
        conditions = repr((request.method, request.raw_path, valid.if_match)).encode()
        record = IdempotencyRecord(valid.token["id"], key, conditions + b"\n" + raw)
        try:
            stored, is_replay = await respond_once(self.database, record, work, without=_without_secrets)
        except InProgress as error:
            raise Refused(Problem.IN_PROGRESS) from error
        except KeyReused as error:
            raise Refused(Problem.KEY_REUSED) from error
        response = _response(stored)
        if is_replay:
            response.headers["Idempotency-Replayed"] = "true"
        return response


@dataclass(frozen=True, slots=True)
class _ValidRequest:
    """A validated request, before its transaction is opened."""

    token: Entity
    path: dict[str, str]
    query: Any
    body: Any
    if_match: str | None
    must_exist: bool
    must_be_new: bool
    actor: Actor

    def in_transaction(self, service: Service, joined: StatementRunner) -> ApiRequest:
        directory = Directory(
            joined,
            service.key_format,
            self.actor,
            tenant_id=self.token["tenant"],
            mint=service.mint,
            approvals=service.config.settings.approvals,
            secrets=service.secrets,
            settings=service.config.settings,
        )
        return ApiRequest(
            directory,
            service.database,
            service.config,
            self.token,
            self.path,
            self.query,
            self.body,
            self.if_match,
            must_exist=self.must_exist,
            must_be_new=self.must_be_new,
        )


def _stored(response: ApiResponse) -> StoredResponse:
    version = None if response.is_version_of is None else etag(response.is_version_of)
    return {"status": response.status, "content": response.content, "etag": version, "location": response.location}


def _response(stored: StoredResponse) -> web.Response:
    headers = {}
    if stored["etag"] is not None:
        headers["ETag"] = f'"{stored["etag"]}"'
    if stored["location"] is not None:
        headers["Location" if stored["status"] == 201 else "Content-Location"] = stored["location"]
    body = orjson.dumps(stored["content"])
    return web.Response(status=stored["status"], body=body, content_type="application/json", headers=headers)


def _without_secrets(stored: StoredResponse) -> StoredResponse:
    """The same response, with each secret replaced by null, and without the token of an agent."""
    content = {name: value for name, value in stored["content"].items() if name not in _OMITTED}
    return {**stored, "content": _blanked(content)}


def _blanked(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: None if name in _SECRETS else _blanked(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_blanked(one) for one in content]
    return content


async def _streamed(request: web.Request, stream: ApiStream) -> web.StreamResponse:
    # Build the first part before sending the status, so that an immediate failure is reported.
    first = await anext(stream.lines, b"")
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    await response.write(first)
    try:
        async for lines in stream.lines:
            await response.write(lines)
    except StoreUnavailable:
        # Omit the last chunk, so that the client detects an incomplete response.
        if request.transport is not None:
            request.transport.abort()
        raise
    await response.write_eof()
    return response


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
