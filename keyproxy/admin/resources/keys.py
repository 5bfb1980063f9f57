"""Keys: the endpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, Filtered, cursor, page, position
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.leak_models import Leak, LeaksFound
from keyproxy.admin.schemas.request_models import (
    KeyChange,
    KeyIssue,
    KeyQuestion,
    KeyRevoke,
    KeyRotate,
    KeysIssue,
    KeysQuery,
    KeysRevoke,
    KeySuspend,
    LeakReport,
    LeakText,
)
from keyproxy.admin.schemas.response_models import (
    Deleted,
    Key,
    KeyChanged,
    KeyMade,
    KeyRotated,
    Keys,
    KeysIssued,
    KeysOf,
    KeysRevoked,
)
from keyproxy.admin.scopes import Scope
from keyproxy.auth.api_key import SecretKey
from keyproxy.store.directory.directory import KeyFilter, KeyWish, Revocation

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})


async def _keys(request: ApiRequest) -> ApiResponse:
    query: KeysQuery = request.query
    wanted = KeyFilter(
        query.user,
        query.tenant,
        query.is_test,
        query.state,
        _span(query.older_than_seconds),
        _span(query.unused_seconds),
        _span(query.expires_within_seconds),
    )
    if query.sort == "id":
        return await page(query, lambda after, limit: request.directory.keys.list_by_id(after, limit, wanted))
    found = await request.directory.keys.list_by_time(query.sort, position(query), query.limit, wanted)
    return ApiResponse({"items": found.items, "next": cursor(query, found.next)})


async def _key(request: ApiRequest) -> ApiResponse:
    key = await request.directory.keys.get(request.path["id"])
    return ApiResponse(key, is_version_of=key)


async def _issue(request: ApiRequest) -> ApiResponse:
    body: KeyIssue = request.body
    wish = _wish(request, body)
    key = await request.directory.keys.issue(body.user, wish)
    content = {**key, "warnings": [*_scope_warnings(request, wish), *key.get("warnings", [])]}
    return ApiResponse(content, 201, location=f"/v1/keys/{key['id']}", is_version_of=key)


def _wish(request: ApiRequest, key: KeyIssue) -> KeyWish:
    life = request.config.lifetime(key.given())
    return KeyWish(key.name, _distinct(key.scopes), key.is_test, life, key.plan, _distinct(key.roles), key.acts_for)


def _scope_warnings(request: ApiRequest, wish: KeyWish) -> list[str]:
    """Warnings about a key's own scopes. A key without any may have all it needs from its roles."""
    return request.config.warnings(wish.scopes) if wish.scopes or not wish.roles else []


def _distinct(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))


async def _issue_many(request: ApiRequest) -> ApiResponse:
    body: KeysIssue = request.body
    wishes = [(one.user, _wish(request, one)) for one in body.keys]
    warnings = [warning for _, wish in wishes for warning in _scope_warnings(request, wish)]
    items = await request.directory.key_batches.issue(wishes, reissue_unseen=body.reissue_unseen)
    above = [warning for item in items for warning in item.pop("warnings", ())]
    return ApiResponse({"items": items, "warnings": list(dict.fromkeys([*warnings, *above]))})


async def _change(request: ApiRequest) -> ApiResponse:
    changes = request.body.given()
    changes |= {name: list(_distinct(changes[name])) for name in ("scopes", "roles") if name in changes}
    key = await request.directory.keys.change(request.path["id"], changes, if_match=request.if_match)
    checks_scopes = "scopes" in changes and (changes["scopes"] or not key["roles"])
    warnings = request.config.warnings(changes["scopes"]) if checks_scopes else []
    return ApiResponse({**key, "warnings": [*warnings, *key.get("warnings", [])]}, is_version_of=key)


async def _rotate(request: ApiRequest) -> ApiResponse:
    body: KeyRotate = request.body
    key = await request.directory.keys.rotate(
        request.path["id"],
        grace=timedelta(seconds=body.grace_seconds),
        expires_in=request.config.lifetime(body.given()),
        if_match=request.if_match,
    )
    made = {name: value for name, value in key.items() if name != "old_expires_at"}
    return ApiResponse(key, 201, location=f"/v1/keys/{key['id']}", is_version_of=made)


async def _revoke(request: ApiRequest) -> ApiResponse:
    key = await request.directory.keys.revoke(request.path["id"], request.body.reason, if_match=request.if_match)
    return ApiResponse(key, is_version_of=key)


async def _suspend(request: ApiRequest) -> ApiResponse:
    key = await request.directory.keys.suspend(request.path["id"], request.body.reason, if_match=request.if_match)
    return ApiResponse(key, is_version_of=key)


async def _resume(request: ApiRequest) -> ApiResponse:
    key = await request.directory.keys.resume(request.path["id"], if_match=request.if_match)
    return ApiResponse(key, is_version_of=key)


async def _delete(request: ApiRequest) -> ApiResponse:
    return ApiResponse(await request.directory.keys.delete(request.path["id"], if_match=request.if_match))


async def _revoke_many(request: ApiRequest) -> ApiResponse:
    body: KeysRevoke = request.body
    wanted = Revocation(body.user, body.tenant, _span(body.older_than_seconds), _span(body.unused_seconds))
    revoked: list[str] = []
    if not body.dry_run:
        async with contextlib.aclosing(
            request.directory.key_batches.revoke(wanted, body.reason, batch=body.limit)
        ) as batches:
            revoked = await anext(batches, [])
    return ApiResponse({"revoked": revoked, "remaining": await request.directory.key_batches.count_to_revoke(wanted)})


async def _leaked(request: ApiRequest) -> ApiResponse:
    body: LeakReport = request.body
    if "key" in body.model_fields_set:
        return ApiResponse(
            await request.directory.leaked_keys.report_key(SecretKey(body.key.encode("ascii")), body.reason)
        )
    return ApiResponse(await request.directory.leaked_keys.report_digest(bytes.fromhex(body.digest), body.reason))


async def _leaked_text(request: ApiRequest) -> ApiResponse:
    body: LeakText = request.body
    return ApiResponse(await request.directory.leaked_keys.report_text(_bytes(body.text), body.reason))


async def _whose(request: ApiRequest) -> ApiResponse:
    body: KeyQuestion = request.body
    return ApiResponse(await request.directory.leaked_keys.find(_bytes(body.text)))


def _bytes(text: str) -> bytes:
    # JSON may contain half of a surrogate pair, which other encodings cannot represent.
    return text.encode("utf-8", "replace")


def _span(seconds: int | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)


ENDPOINTS: Final = (
    Endpoint("list_keys", "List keys, sorted by id or by a time.",
             Scope.KEYS_READ, _keys, {200: Keys}, query=KeysQuery, filtered=Filtered("user", Scope.KEYS_WRITE)),
    Endpoint("issue_key", "Issue a key. Its secret is only in this response.",
             Scope.KEYS_WRITE, _issue, {201: KeyMade}, body=KeyIssue, refuses=_NOT_THERE),
    Endpoint("issue_keys",
             "Issue many keys, all or none. A user that already has a working key of that name and mode is skipped, so "
             "the request can be repeated.",
             Scope.KEYS_WRITE, _issue_many, {200: KeysIssued}, body=KeysIssue, refuses=_NOT_THERE),
    Endpoint("revoke_keys",
             "Permanently revoke many keys by user, tenant, age or time since last use. Repeat the request while "
             "some remain.",
             Scope.KEYS_WRITE, _revoke_many, {200: KeysRevoked}, body=KeysRevoke, refuses=_NOT_THERE),
    Endpoint("show_key", "One key.",
             Scope.KEYS_READ, _key, {200: Key}, refuses=_NOT_THERE),
    Endpoint("change_key", "Change a key's name, plan, scopes, roles or acts_for. Takes effect within a second.",
             Scope.KEYS_WRITE, _change, {200: KeyChanged}, body=KeyChange, is_conditional=True, refuses=_NOT_THERE),
    Endpoint("delete_key", "Delete a key. Unlike a revoked key, it disappears from lists.",
             Scope.KEYS_WRITE, _delete, {200: Deleted}, is_conditional=True, refuses=_NOT_THERE),
    Endpoint("rotate_key",
             "Replace a key. The old key works until the grace period ends. The new key has its scopes, roles, "
             "acts_for, mode, plan and name, and both share their limits.",
             Scope.KEYS_WRITE, _rotate, {201: KeyRotated}, body=KeyRotate, may_be_empty=True, is_conditional=True,
             refuses=_NOT_THERE),
    Endpoint("revoke_key", "Revoke a key permanently. Takes effect within a second.",
             Scope.KEYS_WRITE, _revoke, {200: Key}, body=KeyRevoke, may_be_empty=True, is_conditional=True,
             refuses=_NOT_THERE),
    Endpoint("suspend_key",
             "Suspend a key, and its agent tokens, until it is resumed. Takes effect within a second.",
             Scope.KEYS_WRITE, _suspend, {200: Key}, body=KeySuspend, may_be_empty=True, is_conditional=True,
             refuses=_NOT_THERE),
    Endpoint("resume_key",
             "Resume a suspended key. For an hour, the signal that suspended it does not suspend it again.",
             Scope.KEYS_WRITE, _resume, {200: Key}, is_conditional=True, refuses=_NOT_THERE),
    Endpoint("report_leaked_key", "For secret scanners: revoke a leaked key or token and return its owner. "
             "`known` is false if it does not exist.",
             Scope.LEAKS_WRITE, _leaked, {200: Leak}, body=LeakReport),
    Endpoint("report_leaked_text",
             "Revoke every key and token in a text, in whatever notation, and list them. Distinguishes no key, an "
             "incomplete key and an unknown key.",
             Scope.LEAKS_WRITE, _leaked_text, {200: LeaksFound}, body=LeakText),
    Endpoint("find_keys",
             "Find the keys in a text, or those with this id, hint or name. Changes nothing. The text is in "
             "the body because it may hold a secret.",
             Scope.KEYS_READ, _whose, {200: KeysOf}, body=KeyQuestion),
)  # fmt: skip
