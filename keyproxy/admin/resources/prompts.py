"""Prompt templates: the endpoints."""

from __future__ import annotations

from typing import Final

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, cursor, position
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas import response_models
from keyproxy.admin.schemas.request_models import Paged, PromptRegister
from keyproxy.admin.schemas.response_models import PromptRegistered, PromptRemoved, Prompts
from keyproxy.admin.scopes import Scope
from keyproxy.config.categories import category_warnings

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})


async def _prompts(request: ApiRequest) -> ApiResponse:
    found = await request.directory.prompts.list_page(position(request.query), request.query.limit)
    return ApiResponse({"items": found.items, "next": cursor(request.query, found.next)})


async def _prompt(request: ApiRequest) -> ApiResponse:
    prompt = await request.directory.prompts.get(request.path["id"])
    return ApiResponse(prompt, is_version_of=prompt)


async def _register(request: ApiRequest) -> ApiResponse:
    body: PromptRegister = request.body
    prompt = await request.directory.prompts.register(
        request.path["id"], body.category, name=body.name, tenant_id=body.tenant
    )
    content = {**prompt, "warnings": category_warnings(request.config.settings.categories, body.category)}
    status = 201 if prompt["created"] else 200
    return ApiResponse(content, status, location=f"/v1/prompts/{prompt['digest']}", is_version_of=prompt)


async def _remove(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.prompts.remove(request.path["id"]))


ENDPOINTS: Final = (
    Endpoint("list_prompts", "List prompt templates, sorted by digest.",
             Scope.KEYS_READ, _prompts, {200: Prompts}, query=Paged, is_global=True),
    Endpoint("show_prompt", "One prompt template.",
             Scope.KEYS_READ, _prompt, {200: response_models.Prompt}, is_global=True, refuses=_NOT_THERE),
    Endpoint("register_prompt",
             "Register the digest of a system prompt, or change its category and name. Takes effect within a second.",
             Scope.ACCESS_WRITE, _register, {201: PromptRegistered, 200: PromptRegistered}, body=PromptRegister,
             is_global=True, refuses=_NOT_THERE),
    Endpoint("remove_prompt", "Remove a prompt template. Its prompt is then unregistered. Takes effect within a second.",
             Scope.ACCESS_WRITE, _remove, {200: PromptRemoved}, is_global=True, refuses=_NOT_THERE),
)  # fmt: skip
