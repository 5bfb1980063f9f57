"""Handling of requests: bodies, queries, pages, versions, repetitions, methods, bounds."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json

import asyncpg
import pytest

from tests.admin.conftest import Api


@pytest.mark.parametrize(
    ("content", "field", "sentence"),
    [
        ({"user": "u_1", "scope": ["a"]}, "body.scope", "did you mean scopes?"),
        ({}, "body.user", "field required"),
        ({"user": "u 1"}, "body.user", "an id has up to 128 letters"),
        ({"user": "u_1", "is_test": "yes"}, "body.is_test", "valid boolean"),
        ({"user": "u_1", "scopes": ["jobs:*"]}, "body.scopes.0", "without wildcards"),
        ({"user": "u_1", "expires_in_seconds": 0}, "body.expires_in_seconds", "greater than or equal to 1"),
        ({"user": "u_1", "expires_in_seconds": "90d"}, "body.expires_in_seconds", "valid integer"),
        ({"user": "u_1", "name": "a\u0000b"}, "body.name", "control characters"),
        ({"user": "u_1", "name": "\ud800"}, "body.name", "valid string"),
        ({"user": "u_1", "name": "x" * 201}, "body.name", "at most 200 characters"),
        ([], "body", "valid dictionary"),
    ],
)
async def test_an_invalid_body_is_refused_with_the_reason(api: Api, content: object, field: str, sentence: str) -> None:
    await api.user()
    reply = await api.call("POST", "/v1/keys", content)
    assert (reply.status, reply.code) == (422, "invalid")
    assert [error["field"] for error in reply.json["errors"]] == [field]
    assert sentence in reply.json["errors"][0]["detail"]


async def test_unknown_nested_fields_get_a_suggestion_too(api: Api) -> None:
    reply = await api.call("PUT", "/v1/plans/basic", {"limits": {"request_per_day": 5, "rate": "fast"}})
    result = {error["field"]: error["detail"] for error in reply.json["errors"]}
    assert result["body.limits.request_per_day"] == "unknown field; did you mean requests_per_day?"
    assert "number" in result["body.limits.rate"]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"{", "request_malformed"),
        (b"", "request_malformed"),
        (b"\xff", "request_malformed"),
        (b'{"id": "a", "id": "b"}', "request_malformed"),
        (b'{"id": NaN}', "request_malformed"),
        (b"[" * 200_000, "request_malformed"),
        (b"1" * 60_000, "request_malformed"),
        (b'{"id": "' + b"a" * 1_100_000 + b'"}', "body_too_large"),
    ],
)
async def test_a_body_that_cannot_be_read_is_refused(api: Api, raw: bytes, code: str) -> None:
    assert (await api.call("POST", "/v1/tenants", data=raw)).code == code


async def test_a_compressed_body_is_refused_and_never_expanded(api: Api) -> None:
    for encoding, raw in (("gzip", gzip.compress(b'{"id": "a"}')), ("gzip", b"no gzip"), ("deflate", b"no deflate")):
        reply = await api.call("POST", "/v1/tenants", data=raw, headers={"Content-Encoding": encoding})
        assert (reply.status, reply.code) == (415, "media_type_not_supported"), encoding


async def test_a_body_must_be_json_with_its_content_type(api: Api) -> None:
    reply = await api.call("POST", "/v1/tenants", data=b'{"id": "a"}', headers={"Content-Type": "text/plain"})
    assert (reply.status, reply.code) == (415, "media_type_not_supported")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "query.limit"),
        ("limit=501", "query.limit"),
        ("limit=ten", "query.limit"),
        ("limit=1&limit=2", "query.limit"),
        ("is_test=1", "query.is_test"),
        ("state=lost", "query.state"),
        ("tenat=acme", "query.tenat"),
        ("cursor=nonsense", "query.cursor"),
        ("cursor=W10", "query.cursor"),
        ("sort=age", "query.sort"),
    ],
)
async def test_an_invalid_query_is_refused(api: Api, query: str, field: str) -> None:
    reply = await api.call("GET", f"/v1/keys?{query}")
    assert (reply.status, reply.code) == (422, "invalid")
    assert reply.json["errors"][0]["field"] == field


async def test_an_impossible_id_is_not_found(api: Api) -> None:
    for path in ("/v1/users/%00", "/v1/users/a%20b", "/v1/users/%C3%A9", "/v1/nothing", "/v1/users/a/b"):
        reply = await api.call("GET", path)
        assert (reply.status, reply.code) == (404, "not_found"), path


@pytest.mark.parametrize("path", ["/v1/tenants", "/v1/users", "/v1/keys", "/v1/plans", "/v1/keys?sort=created"])
@pytest.mark.parametrize("limit", [1, 4, 5])
async def test_the_pages_of_a_list_hold_everything_once(api: Api, path: str, limit: int) -> None:
    for number in range(5):
        await api.user(f"u_{number}", f"t_{number}")
        await api.directory.plans.set(f"p_{number}", {})
    found: list[str] = []
    cursor = ""
    pages = 0
    while True:
        sign = "&" if "?" in path else "?"
        result = await api.done("GET", f"{path}{sign}limit={limit}" + (f"&cursor={cursor}" if cursor else ""))
        assert len(result["items"]) <= limit
        found += [item["id"] for item in result["items"]]
        pages += 1
        cursor = result["next"]
        if cursor is None:
            break
    assert len(found) == len(set(found)) == 5
    assert pages <= 6


async def test_a_cursor_belongs_to_the_list_that_it_came_from(api: Api) -> None:
    for number in range(3):
        await api.user(f"u_{number}")
    cursor = (await api.done("GET", "/v1/users?limit=1"))["next"]
    assert (await api.call("GET", f"/v1/users?limit=2&cursor={cursor}")).status == 200
    for path in (f"/v1/users?tenant=acme&cursor={cursor}", f"/v1/tenants?cursor={cursor}"):
        assert (await api.call("GET", path)).json["errors"][0]["field"] == "query.cursor"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("tenants/acme", {"name": "x"}),
        ("users/u_1", {"disabled": True}),
        ("keys/{key}", {"name": "x"}),
        ("plans/basic", {"limits": {"concurrency": 3}}),
    ],
)
async def test_an_update_is_refused_if_the_object_has_changed_meanwhile(api: Api, kind: str, change: object) -> None:
    key = (await api.user())["key"]
    await api.done("PUT", "/v1/plans/basic", {"limits": {}})
    path, method = f"/v1/{kind.format(key=key['id'])}", "PUT" if kind.startswith("plans") else "PATCH"
    version = (await api.call("GET", path)).headers["ETag"]
    first = await api.call(method, path, change, headers={"If-Match": version})
    assert first.status == 200
    late = await api.call(method, path, change, headers={"If-Match": version})
    assert (late.status, late.code) == (412, "outdated")
    assert (await api.call("DELETE", path, headers={"If-Match": version})).code == "outdated"
    assert (await api.call(method, path, change, headers={"If-Match": first.headers["ETag"]})).status == 200
    assert (await api.call(method, path, change, headers={"If-Match": f"W/{first.headers['ETag']}"})).status == 412
    assert (await api.call(method, path, change, headers={"If-Match": "*"})).status == 200
    assert (await api.call(method, path, change, headers={"If-Match": "no tag"})).code == "request_malformed"


async def test_a_plan_is_written_only_if_its_precondition_holds(api: Api) -> None:
    body: dict[str, object] = {"limits": {}}
    assert (await api.call("PUT", "/v1/plans/a", body, headers={"If-Match": "*"})).code == "outdated"
    assert (await api.call("PUT", "/v1/plans/a", body, headers={"If-Match": '"x"'})).code == "outdated"
    assert (await api.call("PUT", "/v1/plans/a", body, headers={"If-None-Match": "*"})).status == 201
    assert (await api.call("PUT", "/v1/plans/a", body, headers={"If-None-Match": "*"})).code == "outdated"


async def test_of_concurrent_requests_that_require_a_new_plan_one_succeeds(api: Api) -> None:
    wanted = [
        api.call("PUT", "/v1/plans/a", {"limits": {"concurrency": number}}, headers={"If-None-Match": "*"})
        for number in range(8)
    ]
    replies = await asyncio.gather(*wanted)
    assert sorted(reply.status for reply in replies) == [201] + [412] * 7
    (made,) = [reply for reply in replies if reply.status == 201]
    assert (await api.done("GET", "/v1/plans/a"))["limits"] == made.json["limits"]


async def test_a_repeated_request_gets_the_same_response_and_is_executed_once(api: Api) -> None:
    await api.user()
    headers = {"Idempotency-Key": '"7d5c"'}
    first = await api.call("POST", "/v1/keys", {"user": "u_1"}, headers=headers)
    again = await api.call("POST", "/v1/keys", {"user": "u_1"}, headers=headers)
    assert (first.status, again.status) == (201, 201)
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["ETag"] == first.headers["ETag"]
    assert again.json == {**first.json, "secret": None}
    assert (await api.done("GET", "/v1/users/u_1"))["keys"] == 2


async def test_no_secret_is_stored_with_a_response(api: Api, dsn: str) -> None:
    await api.directory.tenants.create("acme", "")
    made = await api.done("POST", "/v1/users", {"id": "u_1", "tenant": "acme"}, headers={"Idempotency-Key": "a-secret"})
    await api.done("POST", "/v1/leaked-keys", {"key": made["key"]["secret"]}, headers={"Idempotency-Key": "b"})
    connection = await asyncpg.connect(dsn)
    kept = str(await connection.fetch("SELECT * FROM keyproxy.answered_requests"))
    await connection.close()
    assert "u_1" in kept
    assert made["key"]["secret"] not in kept
    assert made["key"]["secret"][12:40] not in kept
    assert "a-secret" not in kept


async def test_a_key_that_came_with_another_request_is_refused(api: Api) -> None:
    headers = {"Idempotency-Key": "k"}
    await api.done("POST", "/v1/tenants", {"id": "a"}, headers=headers)
    reply = await api.call("POST", "/v1/tenants", {"id": "b"}, headers=headers)
    assert (reply.status, reply.code) == (422, "idempotency_key_reused")
    assert (await api.call("POST", "/v1/users", {"id": "a", "tenant": "a"}, headers=headers)).status == 422
    # Idempotency keys are separate for each token.
    other = await api.token("admin:write")
    assert (await api.call("POST", "/v1/tenants", {"id": "b"}, headers=headers, token=other)).status == 201


async def test_a_refused_request_is_judged_again_when_it_is_sent_again(api: Api) -> None:
    headers = {"Idempotency-Key": "k"}
    body = {"id": "u_1", "tenant": "acme"}
    assert (await api.call("POST", "/v1/users", body, headers=headers)).code == "not_found"
    await api.directory.tenants.create("acme", "")
    assert (await api.call("POST", "/v1/users", body, headers=headers)).status == 201


async def test_of_the_same_request_sent_many_times_at_once_one_is_done(api: Api) -> None:
    await api.user()
    wanted = [api.call("POST", "/v1/keys", {"user": "u_1"}, headers={"Idempotency-Key": "k"}) for _ in range(10)]
    replies = await asyncio.gather(*wanted)
    assert {reply.code for reply in replies} <= {"", "idempotency_in_progress"}
    assert sum(reply.status == 201 and reply.json["secret"] is not None for reply in replies) == 1
    assert (await api.done("GET", "/v1/users/u_1"))["keys"] == 2


async def test_a_failure_after_the_change_rolls_it_back(api: Api, dsn: str) -> None:
    """The response cannot be stored: neither the key nor its audit row is committed."""
    await api.user()
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("ALTER TABLE keyproxy.answered_requests ADD CONSTRAINT never CHECK (false)")
        rows = len(await api.audit())
        reply = await api.call("POST", "/v1/keys", {"user": "u_1"}, headers={"Idempotency-Key": "k"})
        assert reply.code == "conflict"
        assert (await api.done("GET", "/v1/users/u_1"))["keys"] == 1
        assert len(await api.audit()) == rows
    finally:
        await connection.execute("ALTER TABLE keyproxy.answered_requests DROP CONSTRAINT never")
        await connection.close()


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256])
async def test_an_idempotency_key_is_one_token(api: Api, key: str) -> None:
    reply = await api.call("POST", "/v1/tenants", {"id": "a"}, headers={"Idempotency-Key": key})
    assert reply.code == "request_malformed"


async def test_head_matches_get_and_options_lists_the_methods(api: Api) -> None:
    await api.user()
    got, headed = await api.call("GET", "/v1/users/u_1"), await api.call("HEAD", "/v1/users/u_1")
    assert (headed.status, headed.body) == (200, b"")
    assert headed.headers["ETag"] == got.headers["ETag"]
    options = await api.call("OPTIONS", "/v1/users/u_1", token=None)
    assert (options.status, options.headers["Allow"]) == (204, "DELETE, GET, HEAD, OPTIONS, PATCH")
    wrong = await api.call("PUT", "/v1/users/u_1", {})
    assert (wrong.status, wrong.code) == (405, "method_not_allowed")
    assert "PATCH" in wrong.headers["Allow"]


async def test_every_response_has_an_id_and_is_not_cacheable(api: Api) -> None:
    for path in ("/v1/tenants", "/v1/nothing", "/docs", "/openapi.json", "/livez", "/v1/audit/export"):
        reply = await api.call("GET", path)
        assert len(reply.headers["X-Request-Id"]) == 32
        assert reply.headers["Cache-Control"] == "no-store"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert "Server" not in reply.headers
        if reply.code:
            assert reply.json["request_id"] == reply.headers["X-Request-Id"]


@pytest.mark.parametrize(("method", "logged"), [("PATCH", "PATCH"), ("PROPFIND", "")])
async def test_log_line_of_a_method_that_is_not_allowed_names_it_if_it_is_a_registered_one(
    api: Api, method: str, logged: str
) -> None:
    assert (await api.call(method, "/v1/plans")).status == 405
    assert (api.log[-1]["method"], api.log[-1]["path"], api.log[-1]["status"]) == (logged, "/v1/plans", 405)


async def test_each_request_leaves_a_log_line_without_a_secret(api: Api) -> None:
    key = (await api.user())["key"]
    await api.done("POST", f"/v1/keys/{key['id']}/revoke")
    await api.call("GET", f"/v1/keys/{key['secret']}")
    changed, looked = api.log
    assert (changed["method"], changed["path"], changed["status"]) == ("POST", f"/v1/keys/{key['id']}/revoke", 200)
    assert (changed["token"], changed["peer"], changed["route"]) == ("file", "127.0.0.1", "/v1/keys/{id}/revoke")
    assert (looked["path"], looked["code"]) == ("", "not_found")
    assert key["secret"] not in json.dumps(api.log)


async def test_no_refusal_repeats_a_key_that_was_given_where_something_else_belongs(api: Api) -> None:
    key = (await api.user())["key"]
    secret, token = key["secret"], await api.token("keys:read")
    requests: list[tuple[str, str, object]] = [
        ("GET", f"/v1/keys/{secret}", None),
        ("GET", f"/v1/users/{secret}", None),
        ("GET", f"/v1/keys/{token}", None),
        ("GET", f"/v1/keys?{secret}=1", None),
        ("POST", f"/v1/keys/{secret}/revoke", {}),
        ("PATCH", f"/v1/keys/{key['id']}", {"plan": secret}),
        ("PATCH", f"/v1/keys/{key['id']}", {secret: 1}),
        ("PATCH", f"/v1/keys/{key['id']}", {"scopes": [f"{secret}*"]}),
        ("POST", "/v1/keys", {"user": secret}),
        ("POST", "/v1/keys/issue", {"keys": [{"user": secret}]}),
        ("PATCH", "/v1/plans/p", {"limits": {"rate": secret}}),
    ]
    for method, path, content in requests:
        reply = await api.call(method, path, content)
        assert reply.status >= 400
        for private in (secret, token):
            assert private[:24].encode() not in reply.body


async def test_an_unavailable_store_is_a_503(api: Api) -> None:
    await api.database.close()
    for method, path in (("GET", "/v1/tenants"), ("DELETE", "/v1/tenants/a")):
        reply = await api.call(method, path)
        assert (reply.status, reply.code, reply.headers["Retry-After"]) == (503, "store_unavailable", "2")
    assert (await api.call("GET", "/readyz", token=None)).status == 503
    assert (await api.call("GET", "/livez", token=None)).status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /v1/keys?a=%b%b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/keys/%b HTTP/1.1\r\nHost: a\r\nX-Long: %b\r\n\r\n",
        b"GET /%b\x00 HTTP/1.1\r\nHost: a\r\nA%b\r\n\r\n",
    ],
)
async def test_malformed_requests_are_refused_and_not_logged(
    api: Api, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    secret = (await api.user())["key"]["secret"]
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(raw % (secret.encode(), b"a" * 70_000))
        # The server may reset a connection whose input it no longer reads.
        with contextlib.suppress(ConnectionResetError):
            assert (await reader.readline()).split()[1] == b"400"
    finally:
        writer.transport.abort()
    assert secret not in caplog.text
    assert secret not in str(api.log)


async def test_the_root_leads_to_the_reference(api: Api) -> None:
    for method in ("GET", "HEAD"):
        reply = await api.call(method, "/", token=None)
        assert (reply.status, reply.headers["Location"]) == (302, "/docs")
    assert "GET" in (await api.call("OPTIONS", "/", token=None)).headers["Allow"]


@pytest.mark.parametrize(
    ("method", "path", "content"),
    [
        ("PUT", "/v1/plans/p", b'{"limits": {"requests_per_day": 1000000000000000}}'),
        ("PATCH", "/v1/plans/p", b'{"limits": {"requests_per_day": 99999999999999999999}}'),
        ("PATCH", "/v1/plans/p", b'{"limits": {"rate": 1' + b"0" * 250 + b"}}"),
        ("GET", "/v1/keys?limit=" + "9" * 30, None),
        ("GET", "/v1/keys?older_than_seconds=" + "9" * 5000, None),
    ],
)
async def test_a_number_that_is_too_large_is_reported_as_such(
    api: Api, method: str, path: str, content: bytes | None
) -> None:
    reply = await api.call(method, path, data=content)
    assert (reply.status, reply.code) == (422, "invalid")
    (error,) = reply.json["errors"]
    assert "less than or equal to" in error["detail"] or "too large" in error["detail"]
    endless = await api.call("PUT", "/v1/plans/p", data=b'{"limits": {"burst": ' + b"9" * 5000 + b"}}")
    assert (endless.status, endless.code) == (400, "request_malformed")
    assert "a number is too large" in endless.json["detail"]


async def test_a_patch_changes_only_named_limits_and_creates_a_missing_plan(api: Api) -> None:
    made = await api.call("PATCH", "/v1/plans/p", {"limits": {"rate": 5, "burst": 9}})
    assert (made.status, made.json["created"], made.json["limits"]) == (201, True, {"rate": 5.0, "burst": 9})
    changed = await api.call("PATCH", "/v1/plans/p", {"limits": {"burst": None, "concurrency": 3}})
    assert (changed.status, changed.json["limits"]) == (200, {"rate": 5.0, "concurrency": 3})
    assert changed.json["changed"] == {"burst": {"old": 9, "new": None}, "concurrency": {"old": None, "new": 3}}
    stale = await api.call("PATCH", "/v1/plans/p", {"limits": {}}, headers={"If-Match": made.headers["ETag"]})
    assert stale.code == "outdated"
    fresh = await api.call("PATCH", "/v1/plans/p", {"limits": {}}, headers={"If-Match": changed.headers["ETag"]})
    assert (fresh.status, fresh.json["changed"]) == (200, {})
    absent = await api.call("PATCH", "/v1/plans/q", {"limits": {}}, headers={"If-Match": '"x"'})
    assert absent.code == "not_found"


async def test_plans_changed_at_once_keep_every_change(api: Api) -> None:
    limits = ("concurrency", "requests_per_day", "requests_per_month", "tokens_per_day", "tokens_per_month")
    replies = await asyncio.gather(*(api.call("PATCH", "/v1/plans/p", {"limits": {one: 7}}) for one in limits))
    assert sorted(reply.status for reply in replies) == [200, 200, 200, 200, 201]
    assert (await api.done("GET", "/v1/plans/p"))["limits"] == dict.fromkeys(limits, 7)


async def test_keys_in_a_text_are_found_and_revoked_by_scope(api: Api) -> None:
    first, other = (await api.user())["key"], (await api.user("o_1", "other"))["key"]
    text = f"Bearer {first['secret']}\nBearer {other['secret']}"
    reader, reporter = await api.token("keys:read"), await api.token("leaks:write")
    bound = await api.token("keys:read", "leaks:write", tenant="acme")
    assert (await api.call("POST", "/v1/keys/whose", {"text": text}, token=reporter)).code == "insufficient_scope"
    assert (await api.call("POST", "/v1/leaked-texts", {"text": text}, token=reader)).code == "insufficient_scope"
    whose = await api.done("POST", "/v1/keys/whose", {"text": text}, token=reader)
    assert {key["id"] for key in whose["keys"]} == {first["id"], other["id"]}
    assert {key["state"] for key in whose["keys"]} == {"active"}
    for text_or_id in (text, first["hint"], first["id"]):
        keys = (await api.done("POST", "/v1/keys/whose", {"text": text_or_id}, token=bound))["keys"]
        assert [key["id"] for key in keys] == [first["id"]]
    assert (await api.done("POST", "/v1/keys/whose", {"text": other["hint"]}, token=bound))["keys"] == []
    result = await api.done("POST", "/v1/leaked-texts", {"text": text, "reason": "on a page"}, token=bound)
    found = {"key": first["id"], "user": "u_1", "tenant": "acme", "revoked_now": True}
    assert result == {"found": [found], "incomplete": 0, "unknown": 1}
    assert (await api.done("GET", f"/v1/keys/{other['id']}"))["state"] == "active"
    again = await api.done("POST", "/v1/leaked-texts", {"text": text}, token=reporter)
    assert {one["key"]: one["revoked_now"] for one in again["found"]} == {first["id"]: False, other["id"]: True}
    assert (await api.done("GET", f"/v1/keys/{first['id']}"))["revoke_reason"] == "on a page"
    assert first["secret"] not in str(api.log) + str(await api.audit())
