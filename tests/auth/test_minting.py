"""Requests for agent tokens: what is read, what is refused, and which member a refusal names."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.auth import minting
from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.minting import MintedToken, MintParent, MintRequest, MintRules, parse_mint_request
from keyproxy.http.headers import FieldNames
from keyproxy.http_messages import RequestHead
from keyproxy.model import AgentToken, Identity, Moment
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing.head_cache import RequestReader
from tests import fakes

RULES = MintRules(("keyproxy", "reports"), ttl_seconds_max=900, depth_max=1, tokens_max=1_000, issuer="keyproxy")
NOW = Moment(1_000_000.4, 5.0)


def body(**members: Any) -> bytes:
    return json.dumps({"agent": "crawler", "role": "reader", **members}).encode()


def parsed(raw: bytes) -> MintRequest:
    return parse_mint_request(raw, RULES)


def refusal(raw: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parsed(raw)
    return caught.value


def test_request_has_what_its_members_state() -> None:
    everything = body(token_budget=10_000, request_budget=0, ttl_seconds=1, audience="reports")
    assert parsed(everything) == MintRequest("crawler", "reader", None, 10_000, 0, 1, "reports")
    asked = b'{"agent":"a.B-c_9","scopes":["data:read","jobs:write","data:read"]}'
    assert parsed(asked) == MintRequest("a.B-c_9", None, ("data:read", "jobs:write"), None, None, None, "keyproxy")


def test_null_is_an_omitted_member() -> None:
    nulls = body(scopes=None, token_budget=None, request_budget=None, ttl_seconds=None, audience=None)
    assert parsed(nulls) == parsed(body())
    assert refusal(body(agent=None)).field == "agent"
    assert refusal(body(role=None)).field == "role"


@pytest.mark.parametrize(
    ("member", "values"),
    [
        ("agent", ["", " crawler", "-crawler", "crawler/1", "crawler\n", "c" * 65, "ünïcode", "\ud800", 1, True, [], {}]),
        ("role", ["", "Reader", "reader ", "9", "r" * 65, 1, True, ["reader"], {}]),
        ("scopes", ["data:read", {}, 1, True, [""], ["data:*"], ["a b"], ["s" * 65], [1], [None], [["data:read"]]]),
        ("token_budget", [-1, 10**15 + 1, 1.0, 1e3, True, False, "1", [1], {}]),
        ("request_budget", [-1, 10**15 + 1, 1.5, True, "1", [], {}]),
        ("ttl_seconds", [0, -1, 901, 1.0, True, "900", [], {}]),
        ("audience", ["", "Keyproxy", "keyproxy ", "upstream", 1, True, ["keyproxy"], {}]),
    ],
)  # fmt: skip
def test_wrong_value_is_refused_and_its_member_named(member: str, values: list[Any]) -> None:
    for value in values:
        raw = json.dumps({"agent": "crawler", **({} if member == "scopes" else {"role": "reader"}), member: value})
        found = refusal(raw.encode())
        assert (found.reason, found.field) == (Reason.REQUEST_MALFORMED, member), value
        assert member in found.caller_text


@pytest.mark.parametrize(
    ("member", "values"),
    [
        ("agent", ["c", "9", "c" * 64]),
        ("token_budget", [0, 10**15]),
        ("request_budget", [0, 10**15]),
        ("ttl_seconds", [1, 900]),
        ("audience", ["keyproxy", "reports"]),
    ],
)
def test_values_at_the_bounds_are_valid(member: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(parsed(body(**{member: value})), member) == value


@pytest.mark.parametrize("number", ["1e3", "1E0", "1.0", "10e-1", "1" * 5_000, "-" + "9" * 30, "9" * 21])
def test_number_that_is_no_bounded_integer_is_refused(number: str) -> None:
    raw = b'{"agent":"a","role":"r","token_budget":%b}' % number.encode()
    assert refusal(raw).field == "token_budget"


def test_exactly_one_of_role_and_scopes_is_required() -> None:
    assert refusal(b'{"agent":"a"}').field == "role"
    assert refusal(b'{"agent":"a","role":"r","scopes":["data:read"]}').field == "role"
    assert refusal(b'{"agent":"a","role":"r","scopes":[]}').field == "role"


def test_no_scopes_at_all_are_well_formed_and_beyond_any_authority() -> None:
    assert parsed(b'{"agent":"a","scopes":[]}').scopes == ()


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b'{"agent":"a","agent":"b","role":"r"}', "agent"),
        (b'{"agent":"a","\\u0061gent":"a","role":"r"}', "agent"),
        (b'{"agent":"a","role":"r","ttl_seconds":1,"ttl_seconds":1}', "ttl_seconds"),
    ],
)
def test_duplicate_member_is_refused_and_named(raw: bytes, named: str) -> None:
    assert refusal(raw).field == named


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b'{"agent":"a","role":"r","budget":1}', "'budget'"),
        (b'{"agent":"a","role":"r","tools":[]}', "'tools'"),
        (b'{"agent":"a","role":"r","Agent":"a"}', "'Agent'"),
        (b'{"agent":"a","role":"r","toolNames":[]}', "'toolNames'"),
        (b'{"agent":"a","role":"r","a1b2c3d4":[]}', ""),
        (b'{"agent":"a","role":"r","agent ":"a"}', ""),
        (b'{"agent":"a","role":"r","":"a"}', ""),
    ],
)
def test_unknown_member_is_refused_and_named_if_it_is_a_plain_word(raw: bytes, shown: str) -> None:
    found = refusal(raw)
    assert found.reason is Reason.REQUEST_MALFORMED
    assert shown in found.caller_text
    assert "token_budget" in found.caller_text


def test_refusal_repeats_nothing_of_the_body_that_could_be_secret() -> None:
    secret = fakes.key(1).reveal().decode()
    for raw in (
        b'{"agent":"a","role":"r","%b":1}' % secret.encode(), body(agent=f"{secret}!"), body(audience=secret),
        b'{"agent":"a","scopes":["%b !"]}' % secret.encode(), secret.encode(), b'"%b"' % secret.encode(),
        b'{"%b":1,"%b":2}' % (secret.encode(), secret.encode()),
    ):  # fmt: skip
        found = refusal(raw)
        assert secret not in found.caller_text + found.detail + str(found.field)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b" ", b"null", b"[]", b'"crawler"', b"1", b"{", b'{"agent":"a","role":"r"}}', b"{'agent':'a','role':'r'}",
        b'{"agent":"a","role":"r",}', b'{"agent":"a","role":"r"} {}', b'{"agent":"a","role":"r"}//', b"agent=a&role=r",
        b'\xef\xbb\xbf{"agent":"a","role":"r"}', '{"agent":"a","role":"r"}'.encode("utf-16"),
        b'{"agent":"a","role":"r\xff"}', b'{"agent":"a","role":"r\n"}', b'{"agent":"a","role":"r","ttl_seconds":NaN}',
        b'{"agent":"a","role":"r","ttl_seconds":Infinity}', b'{"agent":"a","role":"r","ttl_seconds":-Infinity}',
        b'{"agent":"a","role":"r","ttl_seconds":01}', b'{"agent":"a","role":"r","ttl_seconds":+1}',
        b"[" * 16_384, b'{"a":' * 3_000, b"\x1f\x8b\x08\x00",
    ],
)  # fmt: skip
def test_body_that_is_not_one_json_object_is_refused(raw: bytes) -> None:
    assert refusal(raw).reason is Reason.REQUEST_MALFORMED


def test_body_of_16_kib_is_read_and_a_longer_one_is_not() -> None:
    raw = body()
    assert parsed(raw + b" " * (16_384 - len(raw))) == parsed(raw)
    assert refusal(raw + b" " * (16_385 - len(raw))).reason is Reason.BODY_TOO_LARGE


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,\\u0e1.-truefalsn ag', max_size=60).map(str.encode))
def test_any_body_is_a_request_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(parsed(raw), MintRequest)
    except Refusal as found:
        assert found.reason is Reason.REQUEST_MALFORMED  # noqa: PT017 - either outcome is right


def _head(*lines: str) -> RequestHead:
    raw = "\r\n".join(["POST /v1/agent-tokens HTTP/1.1", "Host: p", *lines]).encode() + b"\r\n\r\n"
    return RequestReader(FieldNames(), fakes.holds_key).read(raw, len(raw) - 4)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], None),
        (["Content-Type: application/json"], None),
        (["Content-Type: application/json; charset=utf-8"], None),
        (["Content-Type: application/x-www-form-urlencoded"], None),
        (["Content-Type: application/octet-stream"], None),
        (["Content-Encoding: identity"], None),
        (["Content-Length: 16384"], None),
        (["Content-Length: 16385"], Reason.BODY_TOO_LARGE),
        (["Content-Type: application/json; charset=utf-16"], Reason.REQUEST_MALFORMED),
        (["Content-Type: application/json; charset=utf-7"], Reason.REQUEST_MALFORMED),
        (["Content-Encoding: gzip"], Reason.REQUEST_MALFORMED),
        (["Content-Encoding: identity", "Content-Encoding: br"], Reason.REQUEST_MALFORMED),
    ],
)
def test_head_whose_body_cannot_be_a_request_is_refused(lines: list[str], reason: Reason | None) -> None:
    try:
        minting.check_head(_head(*lines))
    except Refusal as found:
        assert found.reason is reason  # noqa: PT017 - None never equals a reason
    else:
        assert reason is None


def _authority(who: Identity, **asked: Any) -> Reason | None:
    request = MintRequest(**{
        "agent": "a", "role": "r", "scopes": None, "token_budget": None, "request_budget": None, "ttl_seconds": None,
        "audience": "keyproxy", **asked,
    })  # fmt: skip
    try:
        minting.check_authority(who, request, RULES, NOW)
    except Refusal as found:
        return found.reason
    return None


def _token(depth: int = 0, token_budget: int | None = None, request_budget: int | None = None) -> Identity:
    who = fakes.identity(scopes=frozenset({"data:read", "agents:mint"}))
    token = AgentToken("agt_1", ("crawler",), depth, token_budget, request_budget)
    return Identity(
        who.key_id, who.user_id, who.tenant_id, who.scopes, False, NOW.wall_seconds + 100, None, b"", agent_token=token
    )


def test_scopes_are_granted_whole_or_refused() -> None:
    who = fakes.identity(scopes=frozenset({"data:read", "jobs:write"}))
    assert _authority(who, role=None, scopes=("data:read",)) is None
    assert _authority(who, role=None, scopes=("data:read", "jobs:write")) is None
    assert _authority(who, role=None, scopes=("data:read", "data:write")) is Reason.DELEGATION_REFUSED
    assert _authority(who, role=None, scopes=()) is Reason.DELEGATION_REFUSED


def test_token_does_not_outlive_its_parent() -> None:
    who = _token()
    assert _authority(who, ttl_seconds=100) is None
    assert _authority(who, ttl_seconds=101) is Reason.DELEGATION_REFUSED
    assert _authority(who) is None
    assert _authority(fakes.identity(), ttl_seconds=900) is None


def test_budgets_are_at_most_the_parent_s() -> None:
    who = _token(token_budget=10, request_budget=0)
    assert _authority(who, token_budget=10, request_budget=0) is None
    assert _authority(who, token_budget=11) is Reason.DELEGATION_REFUSED
    assert _authority(who, request_budget=1) is Reason.DELEGATION_REFUSED
    assert _authority(who) is None
    assert _authority(_token(), token_budget=10**15) is None


def test_tokens_are_minted_from_tokens_to_the_configured_depth() -> None:
    assert _authority(_token(depth=0)) is None
    assert _authority(_token(depth=1)) is Reason.DELEGATION_REFUSED


def test_parent_is_the_key_the_acting_key_or_the_token() -> None:
    who = fakes.identity("u_42")
    assert minting.parent_of(who) == MintParent("key_of_u_42", None, None, is_operator=False)
    acting = Identity(
        "key_1", "u_42", "acme", who.scopes, False, who.expires_wall_seconds, None, b"", actor_user_id="u_worker"
    )
    assert minting.parent_of(acting) == MintParent("key_1", None, "u_42", is_operator=False)
    assert minting.parent_of(_token()) == MintParent("key_of_u_42", "agt_1", None, is_operator=False)
    assert [minting.actor_of(one) for one in (who, acting, _token())] == [
        "key:key_of_u_42", "key:key_1", "agent_token:agt_1",
    ]  # fmt: skip


@given(st.datetimes(datetime(1970, 1, 1), datetime(2900, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
def test_response_has_the_token_and_its_expiry_in_utc(at: datetime) -> None:
    # Tokens expire at whole seconds, and a float of a late year rounds its microseconds.
    at = at.replace(microsecond=0)
    token = MintedToken(
        "agt_1", SecretKey(b"eyJ.x.y"), "a", "u_42", "acme", ("data:read",), None, 5, "keyproxy", False, 0,
        at.timestamp(),
    )  # fmt: skip
    assert token.to_json() == {
        "id": "agt_1", "token": "eyJ.x.y", "agent": "a", "user": "u_42", "tenant": "acme", "scopes": ["data:read"],
        "token_budget": None, "request_budget": 5, "audience": "keyproxy", "is_test": False, "depth": 0,
        "expires_at": at.isoformat().replace("+00:00", "Z"),
    }  # fmt: skip
    assert "eyJ" not in repr(token)
