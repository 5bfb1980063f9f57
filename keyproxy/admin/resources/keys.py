"""Keys: the endpoints."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Final

from keyproxy.admin.endpoints import Answer, Call, Endpoint, cursor, page, position
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.request_models import (
    KeyChange,
    KeyIssue,
    KeyQuestion,
    KeyRevoke,
    KeyRotate,
    KeysIssue,
    KeysQuery,
    KeysRevoke,
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
    Leak,
    LeaksFound,
)
from keyproxy.admin.scopes import Scope
from keyproxy.auth.api_key import SecretKey
from keyproxy.store.directory.directory import KeyFilter, KeyWish, Revocation

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})


async def _keys(call: Call) -> Answer:
    query: KeysQuery = call.query
    wanted = KeyFilter(
        query.user, query.tenant, query.is_test, query.state, _span(query.older_than_seconds),
        _span(query.unused_seconds), _span(query.expires_within_seconds),
    )  # fmt: skip
    if query.sort == "id":
        return await page(query, lambda after, limit: call.directory.keys(after, limit, wanted))
    found = await call.directory.keys_by_time(query.sort, position(query), query.limit, wanted)
    return Answer({"items": found.items, "next": cursor(query, found.next)})


async def _key(call: Call) -> Answer:
    key = await call.directory.key(call.path["id"])
    return Answer(key, is_version_of=key)


async def _issue(call: Call) -> Answer:
    body: KeyIssue = call.body
    scopes = tuple(dict.fromkeys(body.scopes))
    wish = KeyWish(body.name, scopes, body.is_test, call.terms.life(body.said()), body.plan)
    key = await call.directory.issue_key(body.user, wish)
    content = {**key, "warnings": call.terms.warnings(scopes)}
    return Answer(content, 201, location=f"/v1/keys/{key['id']}", is_version_of=key)


async def _issue_many(call: Call) -> Answer:
    body: KeysIssue = call.body
    wishes = [
        (
            one.user,
            KeyWish(one.name, tuple(dict.fromkeys(one.scopes)), one.is_test, call.terms.life(one.said()), one.plan),
        )
        for one in body.keys
    ]
    warnings = call.terms.warnings(*(wish.scopes for _, wish in wishes))
    items = await call.directory.issue_keys(wishes, reissue_unseen=body.reissue_unseen)
    return Answer({"items": items, "warnings": warnings})


async def _change(call: Call) -> Answer:
    changes = call.body.said()
    if "scopes" in changes:
        changes["scopes"] = list(dict.fromkeys(changes["scopes"]))
    key = await call.directory.change_key(call.path["id"], changes, if_match=call.if_match)
    warnings = call.terms.warnings(changes["scopes"]) if "scopes" in changes else []
    return Answer({**key, "warnings": warnings}, is_version_of=key)


async def _rotate(call: Call) -> Answer:
    body: KeyRotate = call.body
    key = await call.directory.rotate_key(
        call.path["id"], grace=timedelta(seconds=body.grace_seconds), expires_in=call.terms.life(body.said()),
        if_match=call.if_match,
    )  # fmt: skip
    made = {name: value for name, value in key.items() if name != "old_expires_at"}
    return Answer(key, 201, location=f"/v1/keys/{key['id']}", is_version_of=made)


async def _revoke(call: Call) -> Answer:
    key = await call.directory.revoke_key(call.path["id"], call.body.reason, if_match=call.if_match)
    return Answer(key, is_version_of=key)


async def _delete(call: Call) -> Answer:
    return Answer(await call.directory.delete_key(call.path["id"], if_match=call.if_match))


async def _revoke_many(call: Call) -> Answer:
    body: KeysRevoke = call.body
    wanted = Revocation(
        body.user, body.tenant, _span(body.older_than_seconds), _span(body.unused_seconds)
    )  # fmt: skip
    revoked: list[str] = []
    if not body.dry_run:
        async with contextlib.aclosing(call.directory.revoke_keys(wanted, body.reason, batch=body.limit)) as batches:
            revoked = await anext(batches, [])
    return Answer({"revoked": revoked, "remaining": await call.directory.count_to_revoke(wanted)})


async def _leaked(call: Call) -> Answer:
    body: LeakReport = call.body
    if "key" in body.model_fields_set:
        return Answer(await call.directory.report_leaked_key(SecretKey(body.key.encode("ascii")), body.reason))
    return Answer(await call.directory.report_leaked(bytes.fromhex(body.digest), body.reason))


async def _leaked_text(call: Call) -> Answer:
    body: LeakText = call.body
    return Answer(await call.directory.report_leaked_text(_bytes(body.text), body.reason))


async def _whose(call: Call) -> Answer:
    body: KeyQuestion = call.body
    return Answer(await call.directory.whose(_bytes(body.text)))


def _bytes(text: str) -> bytes:
    # JSON may contain half of a surrogate pair, which other encodings cannot represent.
    return text.encode("utf-8", "replace")


def _span(seconds: int | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/keys", "list_keys", "List keys, sorted by id or by a time.",
             Scope.KEYS_READ, _keys, {200: Keys}, query=KeysQuery),
    Endpoint("POST", "/v1/keys", "issue_key", "Issue a key. Its secret is only in this response.",
             Scope.KEYS_WRITE, _issue, {201: KeyMade}, body=KeyIssue, refuses=_NOT_THERE),
    Endpoint("POST", "/v1/keys/issue", "issue_keys",
             "Issue many keys, all or none. A user that already has a working key of that name and mode is skipped, so "
             "the request can be repeated.",
             Scope.KEYS_WRITE, _issue_many, {200: KeysIssued}, body=KeysIssue, refuses=_NOT_THERE),
    Endpoint("POST", "/v1/keys/revoke", "revoke_keys",
             "Permanently revoke many keys by user, tenant, age or time since last use. Repeat the request while "
             "some remain.",
             Scope.KEYS_WRITE, _revoke_many, {200: KeysRevoked}, body=KeysRevoke, refuses=_NOT_THERE),
    Endpoint("GET", "/v1/keys/{id}", "show_key", "One key.",
             Scope.KEYS_READ, _key, {200: Key}, refuses=_NOT_THERE),
    Endpoint("PATCH", "/v1/keys/{id}", "change_key", "Change a key's name, plan or scopes. Takes effect within a second.",
             Scope.KEYS_WRITE, _change, {200: KeyChanged}, body=KeyChange, is_conditional=True, refuses=_NOT_THERE),
    Endpoint("DELETE", "/v1/keys/{id}", "delete_key", "Delete a key. Unlike a revoked key, it disappears from lists.",
             Scope.KEYS_WRITE, _delete, {200: Deleted}, is_conditional=True, refuses=_NOT_THERE),
    Endpoint("POST", "/v1/keys/{id}/rotate", "rotate_key",
             "Replace a key. The old key works until the grace period ends. The new key has its scopes, mode, plan and "
             "name, and both share their limits.",
             Scope.KEYS_WRITE, _rotate, {201: KeyRotated}, body=KeyRotate, may_be_empty=True, is_conditional=True,
             refuses=_NOT_THERE),
    Endpoint("POST", "/v1/keys/{id}/revoke", "revoke_key", "Revoke a key permanently. Takes effect within a second.",
             Scope.KEYS_WRITE, _revoke, {200: Key}, body=KeyRevoke, may_be_empty=True, is_conditional=True,
             refuses=_NOT_THERE),
    Endpoint("POST", "/v1/leaked-keys", "report_leaked_key",
             "For secret scanners: revoke a leaked key and return its owner. `known` is "
             "false if the key does not exist.",
             Scope.LEAKS_WRITE, _leaked, {200: Leak}, body=LeakReport),
    Endpoint("POST", "/v1/leaked-texts", "report_leaked_text",
             "Revoke every key in a text, in whatever notation, and list them. Distinguishes no key, "
             "an incomplete key and an unknown key.",
             Scope.LEAKS_WRITE, _leaked_text, {200: LeaksFound}, body=LeakText),
    Endpoint("POST", "/v1/keys/whose", "find_keys",
             "Find the keys in a text, or those with this id, hint or name. Changes nothing. The text is in "
             "the body because it may hold a secret.",
             Scope.KEYS_READ, _whose, {200: KeysOf}, body=KeyQuestion),
)  # fmt: skip
