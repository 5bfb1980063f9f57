"""Usage, the state of limits, and explanations of requests, through a running `keyproxy admin`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

from keyproxy.cli.remote.http_transport import HttpTransport
from keyproxy.store.ledger.explain import Question
from keyproxy.store.usage.usage_queries import UsageFilter

#: Before all usage. Without a time the admin API returns the last 30 days.
_EVER: Final = "1970-01-01T00:00:00Z"


class RemoteUsage(HttpTransport):
    """UsageOperations over the admin API. Use it as a context manager."""

    async def sums(self, wanted: UsageFilter, by: Sequence[str], limit: int) -> list[dict[str, Any]]:
        query = {**_filters(wanted), "by": ",".join(by), "limit": str(limit)}
        rows: list[dict[str, Any]] = (await self.ask("GET", "/v1/usage", query=query))["items"]
        return rows

    def all_sums(self, wanted: UsageFilter) -> AsyncIterator[dict[str, Any]]:
        return self.lines("/v1/usage/export", _filters(wanted))

    def events(self, wanted: UsageFilter, after: str | None = None) -> AsyncIterator[dict[str, Any]]:
        return self.lines("/v1/usage/events", _filters(wanted) | ({} if after is None else {"after": after}))

    async def windows(self, user_id: str, *, is_test: bool) -> list[dict[str, Any]]:
        query = {"is_test": str(is_test).lower()}
        told = await self.ask("GET", f"/v1/users/{quote(user_id, safe='')}/limits", query=query)
        items: list[dict[str, Any]] = told["items"]
        return items

    async def explained(self, key_id: str, question: Question) -> dict[str, Any]:
        query = {"method": question.method, "path": question.path}
        if question.tokens is not None:
            query["tokens"] = str(question.tokens)
        return await self.ask("GET", f"/v1/keys/{quote(key_id, safe='')}/explain", query=query)


def _filters(wanted: UsageFilter) -> dict[str, str]:
    given = {
        name: value.isoformat() if isinstance(value, datetime) else str(value)
        for name, value in asdict(wanted).items() if value is not None
    }  # fmt: skip
    return given if {"since", "until"} & set(given) else {**given, "since": _EVER}
