"""Usage, the state of limits, and explanations of requests, through a running `keyproxy admin`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, Final

from keyproxy.cli.remote.admin_client import AdminClient
from keyproxy.store.directory.errors import Invalid
from keyproxy.store.ledger.explain import Question
from keyproxy.store.usage.usage_queries import UsageFilter

#: Before all usage. Without a time the admin API returns the last 30 days.
_EVER: Final = "1970-01-01T00:00:00Z"


class RemoteUsage:
    """UsageOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def sums(self, wanted: UsageFilter, by: Sequence[str], limit: int) -> list[dict[str, Any]]:
        content = await self._client.call("show_usage", **_filters(wanted), by=",".join(by), limit=limit)
        rows: list[dict[str, Any]] = content["items"]
        return rows

    def all_sums(self, wanted: UsageFilter) -> AsyncIterator[dict[str, Any]]:
        return self._client.lines("export_usage_sums", **_filters(wanted))

    def events(self, wanted: UsageFilter, after: str | None = None) -> AsyncIterator[dict[str, Any]]:
        return self._client.lines("export_usage", **_filters(wanted), after=after)

    async def origins(self, key_id: str, since: datetime) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = (await self._client.call("show_origins", key_id, since=since.isoformat()))[
            "items"
        ]
        return items

    async def windows(self, user_id: str, *, is_test: bool) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = (await self._client.call("show_limits", user_id, is_test=is_test))["items"]
        return items

    async def explained(self, key_id: str, question: Question) -> dict[str, Any]:
        # An older admin API refuses unknown fields.
        acting = {} if question.act_for is None else {"act_for": question.act_for}
        endpoint = "explain_key" if question.body is None else "explain_request"
        return await self._client.call(endpoint, key_id, **_question_fields(question), **acting)

    async def explained_token(self, token_id: str, question: Question) -> dict[str, Any]:
        endpoint = "explain_agent_token" if question.body is None else "explain_agent_token_request"
        return await self._client.call(endpoint, token_id, **_question_fields(question))


def _question_fields(question: Question) -> dict[str, Any]:
    fields: dict[str, Any] = {"method": question.method, "path": question.path, "tokens": question.tokens}
    if question.model:
        fields["model"] = question.model
    if question.categories:
        fields["category"] = list(question.categories)
    if question.namespaces:
        fields["namespace"] = [f"{source}={value}" for source, value in question.namespaces]
    if question.tool:
        fields["tool"] = question.tool
    if question.has_certificate:
        fields["client_certificate"] = True
    if question.body is None:
        return fields
    try:
        text = question.body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid("the body is not UTF-8 text, so --admin-url cannot send it") from error
    return {**fields, "body": text}


def _filters(wanted: UsageFilter) -> dict[str, Any]:
    fields = asdict(wanted)
    if fields["since"] is None and fields["until"] is None:
        fields["since"] = _EVER
    return fields
