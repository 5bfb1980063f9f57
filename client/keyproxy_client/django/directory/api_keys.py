"""Keys in keyproxy, by requests to its admin API.

A response that is lost takes the secret with it. The request is repeated with the same Idempotency-Key: the repetition
names the key that was issued, without its secret, and that key is revoked and another one issued.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from django.utils import timezone
from django.views.decorators.debug import sensitive_variables

from keyproxy_client.django.directory.admin_api import AdminApi, segment
from keyproxy_client.django.directory.api_values import issued_key, key, lifetime
from keyproxy_client.django.directory.errors import (
    AlreadyIssued,
    DirectoryRefused,
    DirectoryUnavailable,
    KeyConflict,
    KeyLimitReached,
    NotInDirectory,
    ProvisionConflict,
)
from keyproxy_client.django.directory.interface import DirectoryKey, IssuedKey, KeyWish

_LOST: Final = "its secret was lost"
_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys of keyproxy at an admin API. A user has at most `keys_max` working ones when one is issued."""

    api: AdminApi
    keys_max: int

    @sensitive_variables("content")
    def issue(self, user: str, tenant: str, wish: KeyWish, *, actor: str, request: str = "") -> IssuedKey:
        """See Keys. The response shows the tenant: a token that cannot read needs no other request to learn it."""
        self._check_limit(user)
        body = {
            "user": user,
            "name": wish.name,
            "scopes": list(dict.fromkeys(wish.scopes)),
            "is_test": wish.is_test,
            "expires_in_seconds": lifetime(wish.life),
        }
        try:
            content = self._made("/v1/keys", body, request)
        except NotInDirectory as error:
            raise NotInDirectory(f"there is no user {user!r} in keyproxy") from error
        if content["tenant"] != tenant:
            self.revoke(content["id"], "issued for a user of another tenant", actor=actor)
            raise ProvisionConflict(f"user {user!r} exists in keyproxy and belongs to another tenant")
        return issued_key(content)

    def rotate(
        self, key_id: str, *, grace: timedelta, life: timedelta | None, actor: str, request: str = ""
    ) -> IssuedKey:
        """See Keys."""
        body = {"grace_seconds": int(grace.total_seconds()), "expires_in_seconds": lifetime(life)}
        try:
            return issued_key(self._made(f"/v1/keys/{segment(key_id)}/rotate", body, request))
        except DirectoryRefused as error:
            if error.code == "conflict":
                raise KeyConflict(str(error)) from error
            raise

    def revoke(self, key_id: str, reason: str, *, actor: str) -> DirectoryKey:
        """See Keys."""
        response = self.api.call("POST", f"/v1/keys/{segment(key_id)}/revoke", {"reason": reason[:500]})
        return key(response.content)

    def of_user(self, user: str, tenant: str) -> list[DirectoryKey]:
        """See Keys."""
        found = [key(item) for item in self._items({"user": user, "tenant": tenant})]
        return sorted(found, key=_age)

    @sensitive_variables("content")
    def _made(self, path: str, body: Mapping[str, Any], request: str) -> dict[str, Any]:
        """The response that has the secret of a new key. `request`: as for Keys; raises AlreadyIssued."""
        identification = request or uuid.uuid4().hex
        is_repeated = False
        try:
            content = self.api.call("POST", path, body, idempotency_key=identification).content
        except DirectoryUnavailable as error:
            if error.code == "idempotency_in_progress":
                raise AlreadyIssued("") from error
            content = self.api.call("POST", path, body, idempotency_key=identification).content
            is_repeated = True
        if content.get("secret") is not None:
            return content
        if not is_repeated:
            raise AlreadyIssued(content["id"])
        self.revoke(content["id"], _LOST, actor="")
        return self._made(path, body, "")

    def _check_limit(self, user: str) -> None:
        """Raises KeyLimitReached. Two issues at the same moment may both pass: no lock spans the two requests."""
        try:
            now = timezone.now()
            working = sum(key(item).works_at(now) for item in self._items({"user": user}))
        except DirectoryRefused as error:
            if error.code != "insufficient_scope":
                raise
            # keys:write suffices for this count. Keys that have expired and were never revoked are part of it.
            query = {"user": user, "dry_run": True, "limit": 1}
            working = self.api.call("POST", "/v1/keys/revoke", query).content["remaining"]
        if working >= self.keys_max:
            raise KeyLimitReached(f"user {user!r} has {working} working keys; KEYS_PER_USER_MAX is {self.keys_max}")

    def _items(self, conditions: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        query: dict[str, object] = {**conditions, "limit": _PAGE}
        while True:
            page = self.api.call("GET", "/v1/keys", query=query).content
            yield from page["items"]
            if page["next"] is None:
                return
            query["cursor"] = page["next"]


def _age(one: DirectoryKey) -> tuple[float, str]:
    epoch = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
    return (epoch - one.created_at).total_seconds(), one.id
