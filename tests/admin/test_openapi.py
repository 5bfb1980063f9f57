"""The OpenAPI document is accurate: generated requests go to the running API, and responses are checked against it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from keyproxy.admin.reference import openapi
from keyproxy.admin.service import ENDPOINTS
from tests.admin.conftest import FILE_TOKEN, Api, add_oauth_session

DIGEST = "0f" * 32

DOCUMENT = openapi.document(ENDPOINTS)
#: Of the generated requests: valid ones, and invalid ones.
MODES = ("positive", "negative")


async def _things(api: Api) -> dict[str, str]:
    """One object of each kind, by the start of its path."""
    key = (await api.user("u_1", scopes=("a",)))["key"]["id"]
    token = await api.directory.agent_tokens.mint(key, {"agent": "crawler", "scopes": ["a"]})
    await api.user("u_2", "other")
    await api.done("PUT", "/v1/plans/basic", {"limits": {"rate": 1.5}})
    await api.done("PUT", f"/v1/prompts/{DIGEST}", {"category": "code"})
    await api.database.fetch("add_provider_key", "pvk_1", "openai", None, False, b"x" * 40, "k1", "", None)
    grant, session = await add_oauth_session(api, "u_1")
    return {
        "/v1/tenants": "acme", "/v1/users": "u_1", "/v1/keys": key, "/v1/plans": "basic", "/v1/prompts": DIGEST,
        "/v1/agent-tokens": token["id"], "/v1/provider-keys": "pvk_1",
        "/v1/grants": grant, "/v1/sessions": session,
    }  # fmt: skip


def _ask_everything(api: Api, name: str, things: dict[str, str]) -> None:
    # Takes a second, and most processes of a parallel run do not run these tests.
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.core.result import Ok
    from schemathesis.specs.openapi import checks

    mode = GenerationMode(name)
    # The check that valid requests are accepted applies to valid ones only.
    held = [
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
        checks.response_schema_conformance,
        schemathesis.checks.not_a_server_error,
        *([checks.negative_data_rejection] if mode is GenerationMode.NEGATIVE else []),
    ]
    assert {one.value for one in GenerationMode} == set(MODES)
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    operations: list[Any] = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) == len(ENDPOINTS)
    for operation in sorted(operations, key=lambda one: one.method.lower() == "delete"):
        _ask(api, operation, things, mode=mode, held=held)


def _ask(api: Api, operation: Any, things: dict[str, str], *, mode: Any, held: list[Any]) -> None:
    headers = {"Authorization": f"Bearer {FILE_TOKEN}"}
    there = things.get("/".join(operation.path.split("/")[:3]))
    is_valid = mode.value == "positive"

    @settings(
        max_examples=4,
        deadline=None,
        phases=[Phase.generate],
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if is_valid and "id" in case.path_parameters:
            # Responses about existing objects.
            case.path_parameters["id"] = there
        if is_valid and "agent" in case.path_parameters:
            case.path_parameters["agent"] = "crawler"
        if is_valid and "client" in case.path_parameters:
            case.path_parameters["client"] = "worker"
        response = case.call(base_url=api.url, headers=headers)
        case.validate_response(response, checks=held, headers=headers)

    ask()


@pytest.mark.parametrize("mode", MODES)
async def test_every_response_matches_the_document(api: Api, mode: str) -> None:
    await asyncio.to_thread(_ask_everything, api, mode, await _things(api))
    answered = {line["route"] for line in api.log if line["status"] in (200, 201)}
    if mode == "positive":
        assert answered >= {
            "/v1/tenants/{id}", "/v1/users/{id}", "/v1/keys/{id}", "/v1/plans/{id}", "/v1/agent-tokens/{id}",
            "/v1/agent-tokens/{id}/explain", "/v1/users/{id}/agents", "/v1/users/{id}/agents/{agent}",
            "/v1/users/{id}/grants", "/v1/grants/{id}", "/v1/sessions/{id}", "/v1/oauth-clients/{client}",
        }  # fmt: skip
    else:
        assert {line["code"] for line in api.log} >= {"invalid", "not_found"}


async def test_the_document_and_its_page_need_no_token(api: Api) -> None:
    result = await api.call("GET", "/openapi.json", token=None)
    assert result.json == DOCUMENT
    assert (result.json["openapi"], result.headers["Content-Type"]) == ("3.1.0", "application/json")
    page = await api.call("GET", "/docs", token=None)
    assert page.headers["Content-Type"].startswith("text/html")
    for endpoint in ENDPOINTS:
        assert f"id='{endpoint.name}'" in page.body.decode()


async def test_the_page_loads_nothing_and_its_policy_allows_only_its_style(api: Api) -> None:
    page = await api.call("GET", "/docs", token=None)
    text, policy = page.body.decode(), page.headers["Content-Security-Policy"]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    assert not re.search(r"<(script|link|img|iframe|object)|\bsrc=|url\(|@import|\bon\w+=|style=", text)
    assert set(re.findall(r"href=['\"]?([^'\"> ]+)", text)) >= {"/openapi.json"}
    assert not [link for link in re.findall(r"href=['\"]?([^'\"> ]+)", text) if not link.startswith(("#", "/openapi"))]


def test_every_operation_documents_its_scope_and_all_refusals() -> None:
    for endpoint in ENDPOINTS:
        operation = DOCUMENT["paths"][endpoint.path][endpoint.method.lower()]
        assert endpoint.scope is None or f"`{endpoint.scope}`" in operation["description"]
        result = "".join(response["description"] for response in operation["responses"].values())
        assert {problem for problem in endpoint.problems if f"`{problem.code}`" not in result} == set()


def test_every_value_of_the_document_is_described_where_it_is_used() -> None:
    used = set(re.findall(r"#/components/schemas/([\w-]+)", str(DOCUMENT)))
    assert used == set(DOCUMENT["components"]["schemas"])
    assert not re.search(r"'(ge|le)': ", str(DOCUMENT["components"]["schemas"]))
