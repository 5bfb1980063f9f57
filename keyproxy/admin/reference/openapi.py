"""The OpenAPI 3.1 document, generated from the declarations that validate requests."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from keyproxy import __version__
from keyproxy.admin.endpoints import Endpoint
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.field_types import AGENT, AGENT_TOKEN, CLIENT_ID, ID, OBJECT_ID, PLAN_ID, ROLE
from keyproxy.admin.schemas.request_models import NoQuery, RequestModel
from keyproxy.admin.schemas.response_models import ProblemDetails
from keyproxy.http.problem_json import MEDIA_TYPE

_REFERENCE: Final = "#/components/schemas/{model}"
_PARAMETER = re.compile(r"\{(\w+)\}")

#: The patterns of ids, by the start of the path, where they differ from ID.
_ID_PATTERNS: Final = {"/v1/plans": PLAN_ID, "/v1/roles": ROLE, "/v1/owned": OBJECT_ID, "/v1/agent-tokens": AGENT_TOKEN}

_ETAG: Final = {"description": "The version, for use in If-Match.", "schema": {"type": "string"}}
_IF_MATCH: Final = {
    "name": "If-Match",
    "in": "header",
    "description": "Requires this ETag as the current version; `*`: any.",
    "schema": {"type": "string", "pattern": r'^(\*|"[!#-~]*")$'},
}
_IF_NONE_MATCH: Final = {
    "name": "If-None-Match",
    "in": "header",
    "description": "`*`: the object must not exist.",
    "schema": {"type": "string", "pattern": r"^\*$"},
}
_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A request repeated with the same key within 24 hours is not executed again. It gets the same "
    "response, with each `secret` null and without the `token` of an agent.",
    "schema": {"type": "string", "pattern": "^[!#-~]{1,255}$"},
}


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The document for these endpoints."""
    references, definitions = _schemas(endpoints)
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    for endpoint in endpoints:
        paths[endpoint.path][endpoint.method.lower()] = _operation(endpoint, references)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "keyproxy admin API",
            "version": __version__,
            "description": "Manage tenants, users, keys, agents, OAuth, plans, roles, owned ids; read audit and usage.",
        },
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": definitions,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Create one with `keyproxy admin token create`.",
                }
            },
        },
    }


def _schemas(endpoints: Iterable[Endpoint]) -> tuple[dict[type[BaseModel], Any], dict[str, Any]]:
    requests: set[type[BaseModel]] = {one.body for one in endpoints if one.body is not None}
    responses: set[type[BaseModel]] = {model for one in endpoints for model in one.responses.values()}
    responses.add(ProblemDetails)
    both = sorted(
        [(model, "validation") for model in requests] + [(model, "serialization") for model in responses],
        key=lambda pair: (pair[0].__name__, pair[1]),
    )
    references, schema = models_json_schema(both, ref_template=_REFERENCE)  # type: ignore[arg-type]
    by_model: dict[Any, Any] = {model: reference for (model, _), reference in references.items()}
    for definition in schema["$defs"].values():
        definition.pop("title", None)
        for field in definition.get("properties", {}).values():
            field.pop("title", None)
    return by_model, schema["$defs"]


def _operation(endpoint: Endpoint, references: dict[type[BaseModel], Any]) -> dict[str, Any]:
    needs = "" if endpoint.scope is None else f" Requires `{endpoint.scope}`"
    if endpoint.filtered is not None:
        needs += f", or `{endpoint.filtered.scope}` with the filter `{endpoint.filtered.by}`"
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.description.split(". ")[0].split(": ")[0].rstrip("."),
        "description": endpoint.description + (needs and f"{needs}."),
        "parameters": [*_path_parameters(endpoint), *_query_parameters(endpoint.query), *_header_parameters(endpoint)],
        "responses": _responses(endpoint, references),
    }
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": not endpoint.may_be_empty,
            "content": {"application/json": {"schema": references[endpoint.body]}},
        }
    return operation


def _path_parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    pattern = next((one for start, one in _ID_PATTERNS.items() if endpoint.path.startswith(start)), ID)
    patterns = {"id": pattern, "kind": ROLE, "agent": AGENT, "client": CLIENT_ID}
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": patterns[name]}}
        for name in _PARAMETER.findall(endpoint.path)
    ]


def _query_parameters(model: type[RequestModel]) -> list[dict[str, Any]]:
    if model is NoQuery:
        return []
    schema = model.model_json_schema()
    parameters = []
    for name, described in schema["properties"].items():
        # Queries have no null: an omitted parameter means the same.
        kinds = [one for one in described.pop("anyOf", []) if one.get("type") != "null"]
        described = {**described, **(kinds[0] if kinds else {})}
        described.pop("title", None)
        if described.get("default") in (None, ""):
            described.pop("default", None)
        description = described.pop("description", None)
        parameter = {"name": name, "in": "query", "schema": described, "required": name in schema.get("required", [])}
        parameters.append(parameter | ({"description": description} if description else {}))
    return parameters


def _header_parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    return [
        parameter
        for parameter, is_there in (
            (_IF_MATCH, endpoint.is_conditional),
            (_IF_NONE_MATCH, endpoint.may_be_new_only),
            (_IDEMPOTENCY_KEY, endpoint.accepts_idempotency_key),
        )
        if is_there
    ]


def _responses(endpoint: Endpoint, references: dict[type[BaseModel], Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, model in endpoint.responses.items():
        media_type = "application/x-ndjson" if endpoint.is_stream else "application/json"
        responses[str(status)] = {
            "description": (model.__doc__ or "").strip(),
            "content": {media_type: {"schema": references[model]}},
        }
        if endpoint.is_conditional and endpoint.method != "DELETE":
            responses[str(status)]["headers"] = {"ETag": _ETAG}
    by_status: dict[int, list[Problem]] = defaultdict(list)
    for problem in sorted(endpoint.problems, key=lambda one: (one.status, one.code)):
        by_status[problem.status].append(problem)
    for status, problems in by_status.items():
        responses[str(status)] = {
            "description": " ".join(f"`{problem.code}`: {problem.value.sentence}" for problem in problems),
            "content": {MEDIA_TYPE: {"schema": references[ProblemDetails]}},
        }
    return responses
