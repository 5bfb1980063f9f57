"""Queries about traffic: usage, the state of limits, and the decision on a hypothetical request.

`admin.client_usage.UsageClient` has the same interface over a running admin API. One test suite runs on both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from keyproxy.config.schema import Settings
from keyproxy.http.error_responses import ErrorRenderer
from keyproxy.model import Moment
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.identities.identity_rows import TokenResources
from keyproxy.store.ledger.explain import Explanation, Question, explain_identity
from keyproxy.store.postgres.database import Database
from keyproxy.store.usage.explained_credentials import ExplainedCredential, key_credential, token_credential
from keyproxy.store.usage.usage_queries import UsageFilter, UsageReader
from keyproxy.store.usage.user_windows import windows_of_user


class UsageOperations(Protocol):
    """The interface of UsageService, which documents the methods. All raise DirectoryError or StoreUnavailable."""

    async def sums(self, wanted: UsageFilter, by: Sequence[str], limit: int) -> list[dict[str, Any]]: ...
    def all_sums(self, wanted: UsageFilter) -> AsyncIterator[dict[str, Any]]: ...
    def events(self, wanted: UsageFilter, after: str | None = None) -> AsyncIterator[dict[str, Any]]: ...
    async def origins(self, key_id: str, since: datetime) -> list[dict[str, Any]]: ...
    async def windows(self, user_id: str, *, is_test: bool) -> list[dict[str, Any]]: ...
    async def explained(self, key_id: str, question: Question) -> dict[str, Any]: ...
    async def explained_token(self, token_id: str, question: Question) -> dict[str, Any]: ...


class UsageService(UsageReader):
    """Query the database. All methods raise DirectoryError or StoreUnavailable."""

    def __init__(self, database: Database, configured: Settings, now: Callable[[], Moment]) -> None:
        super().__init__(database)
        self._configured = configured
        self._now = now

    async def windows(self, user_id: str, *, is_test: bool) -> list[dict[str, Any]]:
        """The current state of the limits of a user, its tenant, its agents and their tokens."""
        return await windows_of_user(self._database, user_id, self._configured, is_test=is_test, now=self._now)

    async def explained(self, key_id: str, question: Question) -> dict[str, Any]:
        """The decision on a request with this key or OAuth session, and the state of each limit.

        Nothing is charged or sent.
        """
        prefix = self._configured.identity.header_prefix
        oauth = self._configured.oauth
        resources = TokenResources(oauth.resource, oauth.test_resource)
        credential = await key_credential(self._database, key_id, question.act_for, prefix, resources=resources)
        return await self._explained(credential, question)

    async def explained_token(self, token_id: str, question: Question) -> dict[str, Any]:
        """As `explained`, with this agent token."""
        prefix = self._configured.identity.header_prefix
        return await self._explained(await token_credential(self._database, token_id, prefix), question)

    async def _explained(self, credential: ExplainedCredential, question: Question) -> dict[str, Any]:
        identity, configured = credential.identity, self._configured
        explanation = await explain_identity(self._database, identity, question, configured, now=self._now)
        refusal, errors = explanation.refusal, configured.errors
        content: dict[str, Any] = {
            **credential.shown,
            "route": explanation.route,
            "allowed": refusal is None,
            "code": None,
            "status": None,
            "policy": None,
            "detail": None,
            "retry_after_seconds": None,
            "missing_scope": None
            if refusal is None
            else min(set(refusal.missing_scopes) - identity.scopes, default=None),
            **explanation.reservation,
            **_access(explanation),
            "limits": list(explanation.limits),
        }
        if refusal is None:
            return content
        problems = ErrorRenderer(invalid_key_status=errors.invalid_key_status, spent_status=errors.spent_status)
        return content | {
            "code": refusal.reason.code,
            "status": problems.status_of(refusal),
            "policy": None if refusal.limit is None else refusal.limit.policy.name,
            "detail": f"{refusal.reason.value.sentence} {_detail(refusal, credential)}".rstrip(),
            "retry_after_seconds": refusal.retry_after_seconds,
        }


def _detail(refusal: Refusal, credential: ExplainedCredential) -> str:
    """What an operator may know beyond the refusal's own sentence."""
    why = credential.why_refused if refusal.reason is Reason.DELEGATION_REFUSED else ""
    return why or refusal.caller_text or refusal.detail


def _access(explanation: Explanation) -> Mapping[str, Any]:
    """What the request was judged by; on a route that judges no model, the one that it reserves for."""
    return {**explanation.access, "model": explanation.access["model"] or explanation.reservation["model"]}
