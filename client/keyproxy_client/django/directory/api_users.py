"""Users in keyproxy, by requests to its admin API.

A token needs the scopes `users:write` and `keys:write`, and for users of several tenants `keys:read`. Where there is one
tenant, a token that is restricted to it (`tenant:acme`) is the better choice.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from keyproxy_client.django.directory.admin_api import AdminApi, Content, Response, segment
from keyproxy_client.django.directory.api_values import issued_key, lifetime, moment
from keyproxy_client.django.directory.errors import (
    DirectoryRefused,
    DirectoryUnavailable,
    NotInDirectory,
    ProvisionConflict,
)
from keyproxy_client.django.directory.interface import Created, DirectoryUser, IssuedKey, KeyWish, SignUp

_LOST: Final = "its secret was lost"
_REPLACEMENTS_MAX: Final = 5

#: How far the clocks of keyproxy's and Django's hosts may differ.
_CLOCKS_DIFFER: Final = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class ApiUsers:
    """The users of keyproxy at an admin API."""

    api: AdminApi

    def create(
        self, user: str, tenant: str, *, actor: str, first_key: KeyWish | None = None, sign_up: SignUp | None = None
    ) -> Created:
        """See Users.

        The Idempotency-Key is the user's id. The stored response may be that of a user who was deleted since, so a
        replay is followed by a request with a key of its own: it creates the user if there is none, and changes nothing
        otherwise.
        """
        own_key = f"{user}.{sign_up.id if sign_up else uuid.uuid4().hex}"
        body = {"id": user, "tenant": tenant, "key": None if first_key is None else _first_key(first_key)}
        stored: Response | None = None
        try:
            response = self._create(body, user)
        except DirectoryRefused as error:
            if error.code != "idempotency_key_reused":
                raise
            response = self._create(body, own_key)
        else:
            if response.is_replayed:
                stored, response = response, self._create(body, own_key)
        is_new, key = bool(response.content["created"]), response.content["key"]
        made = _user(response.content)
        if first_key is None:
            return Created(made, is_new)
        if key is not None and key["secret"] is not None:
            return Created(made, is_new, issued_key(key))
        lost = key or (_lost_key(stored, sign_up) if not is_new else None)
        return Created(made, is_new, None if lost is None else self._replace(user, first_key, lost, own_key))

    def disable(self, user: str, tenant: str, *, actor: str) -> bool:
        """See Users."""
        return self._is_of(user, tenant) and self._change("PATCH", user, {"disabled": True})

    def enable(self, user: str, tenant: str, *, actor: str) -> bool:
        """See Users."""
        return self._is_of(user, tenant) and self._change("PATCH", user, {"disabled": False})

    def delete(self, user: str, tenant: str, *, actor: str) -> bool:
        """See Users."""
        return self._is_of(user, tenant) and self._change("DELETE", user, None)

    def pages(self, tenant: str | None = None, *, size: int = 500) -> Iterator[list[DirectoryUser]]:
        """See Users."""
        query: dict[str, object] = {"limit": min(size, 500)} | ({"tenant": tenant} if tenant is not None else {})
        while True:
            page = self.api.call("GET", "/v1/users", query=query).content
            if page["items"]:
                yield [_user(item) for item in page["items"]]
            if page["next"] is None:
                return
            query["cursor"] = page["next"]

    def _create(self, body: dict[str, Any], idempotency_key: str) -> Response:
        try:
            return self.api.call("POST", "/v1/users", body, idempotency_key=idempotency_key)
        except DirectoryRefused as error:
            if error.code == "conflict":
                raise ProvisionConflict(
                    f"user {body['id']!r} exists in keyproxy and belongs to another tenant"
                ) from error
            raise

    def _is_of(self, user: str, tenant: str) -> bool:
        """Whether the user exists and belongs to the tenant: ids of two projects may be the same.

        A token that cannot read finds out by creating the user, which changes none that exists.
        """
        try:
            return bool(self.api.call("GET", f"/v1/users/{segment(user)}").content["tenant"] == tenant)
        except NotInDirectory:
            return False
        except DirectoryRefused as error:
            if error.code != "insufficient_scope":
                raise
        try:
            self.api.call("POST", "/v1/users", {"id": user, "tenant": tenant, "key": None})
        except DirectoryRefused as error:
            if error.code != "conflict":
                raise
            return False
        return True

    def _change(self, method: str, user: str, body: dict[str, Any] | None) -> bool:
        try:
            self.api.call(method, f"/v1/users/{segment(user)}", body)
        except NotInDirectory:
            return False
        return True

    def _replace(self, user: str, wish: KeyWish, lost: Content, own_key: str) -> IssuedKey | None:
        """Revoke a key whose secret was lost with a response, and issue another. None if the key was deleted.

        The responses of this may be lost as well: each attempt has its own Idempotency-Key, and what it issued is
        revoked in turn.
        """
        for attempt in range(_REPLACEMENTS_MAX):
            try:
                self.api.call("POST", f"/v1/keys/{segment(lost['id'])}/revoke", {"reason": _LOST})
            except NotInDirectory:
                return None
            body = {"user": user, **_first_key(wish)}
            lost = self.api.call("POST", "/v1/keys", body, idempotency_key=f"{own_key}.{attempt}").content
            if lost["secret"] is not None:
                return issued_key(lost)
        raise DirectoryUnavailable(f"the responses of {_REPLACEMENTS_MAX} requests for the first key were lost")


def _lost_key(stored: Response | None, sign_up: SignUp | None) -> Content | None:
    """The key of a stored response, if an earlier attempt of this sign-up issued it, and not another sign-up."""
    key = None if stored is None else stored.content["key"]
    if key is None or sign_up is None or not sign_up.is_repeated:
        return None
    created_at = moment(key["created_at"])
    return key if created_at is not None and created_at >= sign_up.written_at - _CLOCKS_DIFFER else None


def _first_key(wish: KeyWish) -> dict[str, Any]:
    return {"name": wish.name, "scopes": list(wish.scopes), "expires_in_seconds": lifetime(wish.life)}


def _user(content: dict[str, Any]) -> DirectoryUser:
    return DirectoryUser(content["id"], content["tenant"], content["disabled_at"] is not None)
