"""A retried request is recognised, and no other request is mistaken for it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from keyproxy.http.headers import FieldNames
from keyproxy.http.idempotency_key import Fingerprint, fingerprint
from keyproxy.http_messages import RequestHead
from keyproxy.model import AgentToken, Identity
from keyproxy.reasons import Reason
from keyproxy.wire.parsing.head_cache import RequestReader
from keyproxy.wire.parsing.head_templates import LEARNT_AFTER
from tests import fakes

KEY = "Idempotency-Key: 8e03978e-40d5-43dd-bc93-6894a57f9324"


def head(
    *lines: str, target: str = "/v1/ai/jobs", method: str = "POST", reader: RequestReader | None = None
) -> RequestHead:
    raw = "\r\n".join([f"{method} {target} HTTP/1.1", "Host: proxy.test", *lines, "", ""]).encode("latin-1")
    return (reader or RequestReader(FieldNames(), fakes.holds_key)).read(raw, len(raw) - 4)


def made(
    *lines: str, who: Identity | None = None, content: bytes = b"", method: str = "POST", target: str = "/v1/ai/jobs"
) -> Fingerprint:
    found = fingerprint(who or fakes.identity(), head(*(lines or (KEY,)), method=method, target=target), content)
    assert found is not None
    return found


def test_the_same_request_has_the_same_fingerprint_whatever_other_headers_it_has() -> None:
    one = made(KEY, "Date: Sat, 21 Nov 2026 10:00:00 GMT", "traceparent: 00-1", content=b"{}")
    other = made("X-Trace: 2", KEY.replace("Key:", "key: "), content=b"{}")
    assert one.digest() == other.digest()
    assert len(one.digest()) == 32


def test_any_difference_makes_another_request() -> None:
    users = [
        fakes.identity("u_1"),
        fakes.identity("u_2"),
        fakes.identity("u_1", "other"),
        fakes.identity("u_1", is_test=True),
    ]
    digests = [made(who=who).digest() for who in users]
    digests += [made(who=users[0], content=content).digest() for content in (b"{}", b"{} ", b"\x00")]
    digests += [made(who=users[0], method="PUT").digest()]
    digests += [made(who=users[0], target=target).digest() for target in ("/v1", "/v1?a=1", "/v1?a=2")]
    digests += [made("Idempotency-Key: " + key, who=users[0]).digest() for key in ("a", "b", '"a"', "a" * 255)]
    assert len(set(digests)) == len(digests)


def test_the_fingerprint_names_the_user_and_the_agents_but_neither_key_nor_token() -> None:
    def agent_of(user: str, token_id: str, *agents: str) -> Identity:
        return dataclasses.replace(fakes.identity(user), agent_token=AgentToken(token_id, agents, len(agents) - 1))

    identities = [
        fakes.identity("u_1"),
        dataclasses.replace(fakes.identity("u_2"), actor_user_id="u_1"),
        agent_of("u_1", "agt_1", "crawler"),
        agent_of("u_1", "agt_1", "crawler", "planner"),
        agent_of("u_1", "agt_1", "crawlerplanner"),
        agent_of("u_2", "agt_1", "crawler"),
    ]
    digests = [made(who=who).digest() for who in identities]
    assert len(set(digests)) == len(digests)
    assert made(who=agent_of("u_1", "agt_2", "crawler")).digest() == digests[2]
    assert made(who=fakes.identity("u_2")).digest() == digests[1]


def test_the_fingerprint_of_a_request_with_a_key_never_changes() -> None:
    """Proxies of two releases may see the attempts of one request."""
    assert made(content=b"{}").digest().hex() == "71b7603199ea1d6d26d97d419a8f753ab01b0e773f2619e8bb77c6a4f8d5beeb"


def test_parts_do_not_run_together() -> None:
    pairs = itertools.permutations(("a", "aa", "aaa"), 2)
    assert len({made(who=fakes.identity(user, tenant)).digest() for user, tenant in pairs}) == 6


def test_a_body_in_pieces_is_the_same_body() -> None:
    whole = made(content=b"0123456789")
    pieces = made(content=b"01")
    for piece in (b"2", b"", b"345", b"6789"):
        pieces.feed(piece)
    assert pieces.digest() == whole.digest()
    # Reading the digest does not change it.
    assert pieces.digest() == whole.digest()


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("Idempotency-Key:",),
        ("Idempotency-Key: " + "a" * 256,),
        ("Idempotency-Key: a b",),
        ("Idempotency-Key: \xe9",),
        ("Idempotency-Key: a", "Idempotency-Key: a"),
        ("Idempotency-Key: a", "IDEMPOTENCY-KEY: b"),
        ("X-Idempotency-Key: a",),
        ("X-Other: idempotency-key: a",),
        ("Idempotency-Key: a", "Connection: idempotency-key"),
    ],
)
def test_request_without_exactly_one_valid_key_has_no_fingerprint(lines: tuple[str, ...]) -> None:
    assert fingerprint(fakes.identity(), head(*lines), b"") is None


def test_websocket_handshake_has_no_fingerprint() -> None:
    lines = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: a", "Sec-WebSocket-Version: 13", KEY)
    assert fingerprint(fakes.identity(), head(*lines, method="GET"), b"") is None


def test_heads_parsed_by_template_keep_their_own_keys() -> None:
    reader = RequestReader(FieldNames(), fakes.holds_key)
    digests: dict[str, set[bytes]] = {"a": set(), "b": set(), "c": set()}
    for key in [*"abc"] * LEARNT_AFTER:
        one = head("X-A: 1", f"Idempotency-Key: {key}", reader=reader)
        assert one.fields.has_idempotency_key
        assert f"Idempotency-Key: {key}\r\n".encode() in one.block
        found = fingerprint(fakes.identity(), one, b"")
        assert found is not None
        digests[key].add(found.digest())
    assert [len(each) for each in digests.values()] == [1, 1, 1]
    assert len(set.union(*digests.values())) == 3
    # The last heads were not parsed in full.
    assert one.fields is head("X-A: 1", "Idempotency-Key: d", reader=reader).fields
    assert not head("X-A: 1", reader=reader).fields.has_idempotency_key


def test_only_an_exhausted_window_triggers_a_lookup_and_only_once() -> None:
    fingerprint = made()
    for reason in Reason:
        spent = reason in (Reason.QUOTA_EXHAUSTED, Reason.TOKEN_BUDGET_EXHAUSTED, Reason.SPEND_BUDGET_EXHAUSTED)
        assert fingerprint.may_be_paid(reason) is spent
    fingerprint.is_looked_up = True
    assert not fingerprint.may_be_paid(Reason.QUOTA_EXHAUSTED)
