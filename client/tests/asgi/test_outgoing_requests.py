"""Outgoing requests of every HTTP client: what they carry, where to, and when they are repeated."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyproxy_client import keys
from keyproxy_client.acting import NoActingUser, acting_as
from keyproxy_client.http import SecretUnavailable, WrongOrigin
from keyproxy_client.outgoing import repetition
from keyproxy_client.outgoing.key_sources import KeyFile
from outgoing_clients import AUTHS, CLIENTS, STREAMED, Call, Client
from scripted_server import Reply, ScriptedServer, refusal, unauthorized

KEY = keys.make(entropy=b"\1" * 32)
NEW_KEY = keys.make(entropy=b"\2" * 32)
TEST_KEY = keys.make(entropy=b"\3" * 32, is_test=True)


def options(origin: ScriptedServer, key: Any = KEY, act_for: Any = "u_42", **others: Any) -> dict[str, Any]:
    """The options of a client."""
    return {"origin": origin.origin, "key": key, "act_for": act_for, **others}


def test_request_carries_the_key_in_authorization_and_the_acting_user(client: Client, origin: ScriptedServer) -> None:
    assert client(Call("/v1/jobs?a=1", "POST", b"body"), options(origin)).status == 200
    (sent,) = origin.received
    assert (sent.method, sent.path, sent.body) == ("POST", "/v1/jobs?a=1", b"body")
    assert sent.credentials == ([f"Api-Key {KEY}"], ["u_42"])
    assert sent.values("x-api-key") == []


def test_request_with_the_identity_of_the_key_itself_names_no_user(client: Client, origin: ScriptedServer) -> None:
    with acting_as("u_7"):
        client(Call("/"), options(origin, act_for=None))
    assert origin.received[0].credentials == ([f"Api-Key {KEY}"], [])


@pytest.mark.parametrize(
    "name", ["authorization", "AUTHORIZATION", "X-Keyproxy-Act-For", "x-keyproxy-act_for", "X_Keyproxy_Act_For"]
)
def test_header_of_the_caller_never_stands_beside_the_one_sent(
    client: Client, origin: ScriptedServer, name: str
) -> None:
    client(Call("/", headers={name: "u_other"}), options(origin))
    assert origin.received[0].credentials == ([f"Api-Key {KEY}"], ["u_42"])


@pytest.mark.parametrize("finds", [None, lambda: None])
def test_nothing_is_sent_without_an_acting_user(client: Client, origin: ScriptedServer, finds: Any) -> None:
    chosen = options(origin) if finds is None else options(origin, act_for=finds)
    if finds is None:
        del chosen["act_for"]
    with pytest.raises(NoActingUser):
        client(Call("/", "POST", b"body"), chosen)
    assert origin.received == []


def test_acting_user_of_the_context_is_sent(client: Client, origin: ScriptedServer) -> None:
    chosen = options(origin)
    del chosen["act_for"]
    with acting_as("u_8"):
        client(Call("/"), chosen)
    assert origin.received[0].credentials[1] == ["u_8"]


ELSEWHERE: list[Callable[[str], str]] = [
    lambda origin: origin.replace("127.0.0.1", "127.0.0.2"),
    lambda origin: origin.rpartition(":")[0] + ":1",
    lambda origin: origin.replace("http://", "https://"),
    lambda origin: origin.replace("127.0.0.1", "localhost"),
    lambda origin: origin.replace("127.0.0.1", "127.0.0.1."),
]


@pytest.mark.parametrize("other", ELSEWHERE, ids=["host", "port", "scheme", "name", "dot"])
def test_request_to_another_origin_raises_before_anything_is_sent(
    client: Client, origin: ScriptedServer, other: Callable[[str], str]
) -> None:
    with pytest.raises(WrongOrigin) as raised:
        client(Call(f"{other(origin.origin)}/path?token=secret", "POST", b"body"), options(origin))
    assert origin.received == []
    assert "secret" not in str(raised.value)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("method", "status"), [("GET", 302), ("POST", 301), ("POST", 303), ("POST", 307), ("POST", 308)]
)
def test_redirect_to_another_origin_carries_neither_credential_nor_acting_user(
    client: Client, origin: ScriptedServer, elsewhere: ScriptedServer, method: str, status: int
) -> None:
    origin.script(Reply(status, {"Location": f"{elsewhere.origin}/there"}))
    body = b"body" if method == "POST" else None
    caller = {"X-Keyproxy-Act-For": "u_other"}
    assert client(Call("/", method, body, caller, follows=True), options(origin)).status == 200
    assert [sent.credentials for sent in elsewhere.received] == [([], [])]
    assert KEY not in repr(elsewhere.received)


def test_origin_reached_by_redirect_from_another_receives_no_credential(
    client: Client, origin: ScriptedServer, elsewhere: ScriptedServer
) -> None:
    origin.script(Reply(302, {"Location": f"{elsewhere.origin}/there"}))
    elsewhere.script(Reply(302, {"Location": f"{origin.origin}/v1/deletes"}))
    assert client(Call("/", follows=True), options(origin)).status == 200
    assert [(sent.path, sent.credentials) for sent in origin.received] == [
        ("/", ([f"Api-Key {KEY}"], ["u_42"])),
        ("/v1/deletes", ([], [])),
    ]


def test_challenge_of_another_origin_gets_no_credential(
    client: Client, origin: ScriptedServer, elsewhere: ScriptedServer
) -> None:
    found = iter([KEY, NEW_KEY])
    origin.script(Reply(302, {"Location": f"{elsewhere.origin}/there"}))
    elsewhere.script(unauthorized(), refusal())
    assert client(Call("/", follows=True), options(origin, lambda: next(found))).status == 401
    assert [sent.credentials for sent in elsewhere.received] == [([], [])]
    assert len(origin.received) == 1


CHALLENGES = ['Api-Key realm="keyproxy"', 'Bearer error="invalid_token"\nApi-Key realm="keyproxy"']


@pytest.mark.parametrize("challenge", CHALLENGES, ids=["one", "after-another"])
def test_refused_secret_is_read_again_and_the_request_repeated_once(
    client: Client, origin: ScriptedServer, challenge: str
) -> None:
    found = iter([KEY, NEW_KEY, KEY])
    origin.script(*[refusal(401, "api_key_revoked", retry_after=None, **{"WWW-Authenticate": challenge})] * 3)
    assert client(Call("/", "POST", b"body"), options(origin, lambda: next(found))).status == 401
    assert [sent.credentials[0] for sent in origin.received] == [[f"Api-Key {KEY}"], [f"Api-Key {NEW_KEY}"]]
    assert [sent.body for sent in origin.received] == [b"body"] * 2


def test_key_file_that_changed_unnoticed_is_read_again_after_a_refusal(
    client: Client, origin: ScriptedServer, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n", encoding="ascii")
    before = path.stat()
    file = KeyFile(str(path))
    client(Call("/"), options(origin, file))
    path.write_text(f"{NEW_KEY}\n", encoding="ascii")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    origin.script(unauthorized())
    assert client(Call("/"), options(origin, file)).status == 200
    assert [sent.credentials[0] for sent in origin.received] == [[f"Api-Key {KEY}"], [f"Api-Key {NEW_KEY}"]]


@pytest.mark.parametrize(
    ("reply", "key"),
    [
        (unauthorized(), KEY),
        (refusal(401, retry_after=None, **{"WWW-Authenticate": 'Bearer realm="keyproxy"'}), None),
        (refusal(401, retry_after=None, **{"WWW-Authenticate": 'Api-Key realm="other"'}), None),
        (refusal(403, "insufficient_scope"), None),
    ],
    ids=["same-secret", "other-scheme", "other-realm", "other-status"],
)
def test_other_refusal_of_a_credential_is_returned_unchanged(
    client: Client, origin: ScriptedServer, reply: Reply, key: str | None
) -> None:
    found = iter([KEY, NEW_KEY])
    origin.script(reply)
    result = client(Call("/"), options(origin, key or (lambda: next(found))))
    assert (result.status, result.body, len(origin.received)) == (reply.status, reply.body, 1)


WAITS: list[tuple[Reply, float]] = [
    (refusal(429, "rate_limited", retry_after="1"), 1.0),
    (refusal(429, "quota_exhausted", retry_after="5"), 5.0),
    (refusal(503, "overloaded", retry_after="2"), 2.0),
    (Reply(503, {"Retry-After": "2"}, b'{"code": "overloaded"}'), 2.0),
    (
        Reply(
            503, {"Content-Type": "application/json", "Retry-After": "2"}, b'{"error": {"code": "store_unavailable"}}'
        ),
        2.0,
    ),
]


@pytest.mark.parametrize(("reply", "seconds"), WAITS)
def test_refusal_of_keyproxy_is_waited_for_and_repeated_once(
    client: Client, origin: ScriptedServer, waits: list[float], reply: Reply, seconds: float
) -> None:
    origin.script(reply, reply, reply)
    result = client(Call("/", "POST", b"body"), options(origin))
    assert (result.status, result.body) == (reply.status, reply.body)
    assert [sent.body for sent in origin.received] == [b"body"] * 2
    assert [sent.credentials for sent in origin.received] == [([f"Api-Key {KEY}"], ["u_42"])] * 2
    assert waits == [seconds]


UNCHANGED: list[Reply] = [
    refusal(retry_after=None),
    refusal(retry_after="6"),
    refusal(retry_after="soon"),
    refusal(429, "too_many_requests_of_the_upstream"),
    refusal(500, "internal_error"),
    refusal(502, "upstream_unreachable"),
    Reply(429, {"Retry-After": "0", "Content-Type": "application/json"}, b"not JSON"),
    Reply(429, {"Retry-After": "0", "Content-Type": "application/json"}, b'["rate_limited"]'),
    Reply(503, {"Retry-After": "0", "Content-Type": "application/json"}, b'{"error": {"code": 503}}'),
    Reply(503, {"Retry-After": "0", "Content-Type": "text/html"}, b'{"code": "overloaded"}'),
    Reply(503, {"Retry-After": "0", "Content-Type": "application/json"}, b'{"code": "overloaded"}' + b" " * 65_536),
]


@pytest.mark.parametrize("reply", UNCHANGED)
def test_every_other_response_is_returned_unchanged(
    client: Client, origin: ScriptedServer, waits: list[float], reply: Reply
) -> None:
    origin.script(reply)
    result = client(Call("/"), options(origin))
    assert (result.status, result.body, len(origin.received), waits) == (reply.status, reply.body, 1, [])


def test_wait_is_bounded_as_configured(client: Client, origin: ScriptedServer, waits: list[float]) -> None:
    origin.script(refusal(retry_after="6"))
    assert client(Call("/"), options(origin, wait_max_seconds=6.0)).status == 200
    origin.script(refusal(retry_after="1"))
    assert client(Call("/"), options(origin, wait_max_seconds=0.5)).status == 429
    assert waits == [6.0]


def test_wait_and_a_new_secret_are_one_repetition_each(
    client: Client, origin: ScriptedServer, waits: list[float]
) -> None:
    found = iter([KEY, NEW_KEY])
    origin.script(refusal(retry_after="1"), unauthorized())
    assert client(Call("/", "POST", b"body"), options(origin, lambda: next(found))).status == 200
    assert [sent.credentials[0] for sent in origin.received] == [[f"Api-Key {KEY}"]] * 2 + [[f"Api-Key {NEW_KEY}"]]
    assert waits == [1.0]


@pytest.mark.parametrize("reply", [unauthorized(), refusal()])
def test_request_whose_body_can_be_read_once_is_not_repeated(
    client: Client, origin: ScriptedServer, reply: Reply
) -> None:
    found = iter([KEY, NEW_KEY])
    origin.script(reply)
    result = client(Call("/", "POST", "generator"), options(origin, lambda: next(found)))
    assert (result.status, result.body) == (reply.status, reply.body)
    assert [sent.body for sent in origin.received] == [STREAMED]


@pytest.mark.parametrize("name", ["requests", "aiohttp"])
def test_file_is_sent_again_from_its_start(origin: ScriptedServer, name: str) -> None:
    origin.script(refusal())
    assert CLIENTS[name](Call("/", "POST", "file"), options(origin)).status == 200
    assert [sent.body for sent in origin.received] == [STREAMED] * 2


def test_user_in_test_mode_is_sent_with_the_test_key(client: Client, origin: ScriptedServer) -> None:
    chosen = options(origin, test_key=TEST_KEY)
    del chosen["act_for"]
    with acting_as("u_1", test=True):
        client(Call("/"), chosen)
    with acting_as("u_1"):
        client(Call("/"), chosen)
    assert [sent.credentials[0] for sent in origin.received] == [[f"Api-Key {TEST_KEY}"], [f"Api-Key {KEY}"]]


def test_user_in_test_mode_is_never_sent_with_a_live_key(client: Client, origin: ScriptedServer) -> None:
    chosen = options(origin)
    del chosen["act_for"]
    with acting_as("u_1", test=True), pytest.raises(SecretUnavailable):
        client(Call("/"), chosen)
    assert origin.received == []


def test_codes_are_those_of_refusals_before_the_upstream() -> None:
    assert not repetition.is_refusal(b'{"code": "identity_missing"}')
    assert all(repetition.is_refusal(b'{"code": "%b"}' % code.encode()) for code in repetition.CODES)


@pytest.mark.parametrize("name", AUTHS)
def test_auth_object_serves_clients_that_were_made_without_it(
    origin: ScriptedServer, elsewhere: ScriptedServer, waits: list[float], name: str
) -> None:
    chosen = options(origin)
    found = iter([KEY, NEW_KEY])
    origin.script(refusal(retry_after="1"), unauthorized(), Reply(302, {"Location": f"{elsewhere.origin}/there"}))
    call = Call("/", "POST", b"body", {"X-Keyproxy-Act-For": "u_other"}, follows=True)
    assert AUTHS[name](call, {**chosen, "key": lambda: next(found)}).status == 200
    assert [sent.credentials[0] for sent in origin.received] == [[f"Api-Key {KEY}"]] * 2 + [[f"Api-Key {NEW_KEY}"]]
    assert [sent.credentials for sent in elsewhere.received] == [([], [])]
    with pytest.raises(WrongOrigin):
        AUTHS[name](Call(f"{elsewhere.origin}/"), chosen)


@pytest.mark.parametrize("path", ["/v1/jobs", "v1/jobs"])
def test_path_of_a_client_is_relative_to_the_origin(client: Client, origin: ScriptedServer, path: str) -> None:
    if client is CLIENTS["aiohttp"]:
        path = f"{origin.origin}/v1/jobs"
    client(Call(path), options(origin))
    assert [sent.path for sent in origin.received] == ["/v1/jobs"]
