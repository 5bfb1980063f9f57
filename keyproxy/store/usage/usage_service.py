"""Usage, how limits stand, and what would become of a request: what is looked up of traffic.

`admin.client_usage.UsageClient` is the same, asked of a running admin API. One suite of tests runs on both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from keyproxy.config.schema import Settings
from keyproxy.http.error_responses import Problems
from keyproxy.model import Moment
from keyproxy.store.ledger.explain import Question, explain_key, windows_of_user
from keyproxy.store.postgres.database import Database
from keyproxy.store.usage.usage_queries import UsageFilter, UsageReader


class UsageOperations(Protocol):
    """As the methods of UsageService, which say what they mean. All raise DirectoryError or StoreUnavailable."""

    async def sums(self, wanted: UsageFilter, by: Sequence[str], limit: int) -> list[dict[str, Any]]: ...
    def all_sums(self, wanted: UsageFilter) -> AsyncIterator[dict[str, Any]]: ...
    def events(self, wanted: UsageFilter, after: str | None = None) -> AsyncIterator[dict[str, Any]]: ...
    async def windows(self, user_id: str, *, is_test: bool) -> list[dict[str, Any]]: ...
    async def explained(self, key_id: str, question: Question) -> dict[str, Any]: ...


class UsageService(UsageReader):
    """See the module. All methods raise DirectoryError or StoreUnavailable."""

    def __init__(self, database: Database, configured: Settings, now: Callable[[], Moment]) -> None:
        super().__init__(database)
        self._configured = configured
        self._now = now

    async def windows(self, user_id: str, *, is_test: bool) -> list[dict[str, Any]]:
        """How the limits of a user and of its tenant stand."""
        return await windows_of_user(self._database, user_id, self._configured, is_test=is_test, now=self._now)

    async def explained(self, key_id: str, question: Question) -> dict[str, Any]:
        """What would become of a request with this key, and how each limit stands. Nothing is charged or sent."""
        identity, told = await explain_key(self._database, key_id, question, self._configured, now=self._now)
        refusal, errors = told.refusal, self._configured.errors
        content: dict[str, Any] = {
            "key": identity.key_id, "user": identity.user_id, "tenant": identity.tenant_id, "mode": identity.mode,
            "route": told.route, "allowed": refusal is None, "code": None, "status": None, "policy": None,
            "detail": None, "retry_after_seconds": None, "limits": list(told.limits),
        }  # fmt: skip
        if refusal is None:
            return content
        problems = Problems(invalid_key_status=errors.invalid_key_status, spent_status=errors.spent_status)
        return content | {
            "code": refusal.reason.code,
            "status": problems.status_of(refusal),
            "policy": None if refusal.limit is None else refusal.limit.policy.name,
            "detail": f"{refusal.reason.value.sentence} {refusal.said or refusal.detail}".rstrip(),
            "retry_after_seconds": refusal.retry_after_seconds,
        }
