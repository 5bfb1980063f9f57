"""Classification of header names; request ids; the identity block; X-Forwarded-*."""

from __future__ import annotations

import pytest

from keyproxy.http.forwarding import TrustRule
from keyproxy.http.headers import FieldNames, Kind, sane_request_id
from keyproxy.http.identity_headers import identity_block
from keyproxy.http_messages import RequestFields, RequestHead, RequestLine


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Kind.PLAIN, "Accept Cookie X-Custom X-Keyproxy XKeyproxy-User Not-X-Keyproxy-User 1 - Origin X-Apikey Via"),
        (Kind.RESERVED, "X-Keyproxy-User X_Keyproxy_User x-keyproxy_user X_KEYPROXY-TENANT X-Keyproxy- X-Keyproxy--User"),
        (Kind.RESERVED, "X-Keyproxy-Anything X_Request_Id x-request.id X.Keyproxy.User X_Forwarded_For X-Forwarded.Port"),
        (Kind.RESERVED, "X_Real_Ip X.Real-Ip"),
        (Kind.ACT_FOR, "X-Keyproxy-Act-For X_Keyproxy_Act_For X.Keyproxy.Act.For x-keyproxy_act.for"),
        (Kind.RESERVED, "X-Keyproxy-Act X-Keyproxy-Act-Forx X-Keyproxy-ActFor X-Keyproxy--Act-For"),
        (Kind.DROPPED, "X_Api_Key X.Api.Key x-api_key Keep_Alive Proxy.Authorization Proxy_Connection Http2_Settings"),
        (Kind.DROPPED, "X-Http-Method-Override X-Http-Method X-Method-Override X-Original-Url X-Original-Uri"),
        (Kind.DROPPED, "X-Original-Method X-Rewrite-Url X-Override-Url X_Http_Method_Override Accept_Encoding"),
        (Kind.PLAIN, "X_Custom X.Y _ . Host_ Idempotency_Key X_Usage_Tokens X-Keyproxy X-Http-Method-Overrides"),
        (Kind.CREDENTIAL, "Authorization X-Api-Key"),
        (Kind.HOST, "Host"),
        (Kind.CONTENT_LENGTH, "Content-Length"),
        (Kind.CONTENT_TYPE, "Content-Type"),
        (Kind.TRANSFER_ENCODING, "Transfer-Encoding"),
        (Kind.CONNECTION, "Connection"),
        (Kind.EXPECT, "Expect"),
        (Kind.REQUEST_ID, "X-Request-Id"),
        (Kind.FORWARDED, "X-Forwarded-For X-Forwarded-Proto X-Forwarded-Host X-Forwarded-Port X-Real-Ip Forwarded"),
        (Kind.HOP, "Keep-Alive Proxy-Connection Proxy-Authenticate Proxy-Authorization"),
        (Kind.HOP, "TE Trailer Http2-Settings"),
        (Kind.UPGRADE, "Upgrade"),
        (Kind.UNREADABLE, "Content_Length Content.Length Transfer_Encoding Content_Type Content.Encoding X|Y"),
        (Kind.UNREADABLE, "X!Keyproxy~User X-Keyproxy-Us!er"),
    ],
)  # fmt: skip
def test_a_name_means_the_same_in_any_case(kind: Kind, names: str) -> None:
    for name in names.encode().split():
        known = FieldNames()
        spellings = [name, name.lower(), name.upper(), name.swapcase(), name.title(), name]
        assert {known.kind(spelling) for spelling in spellings} == {kind}, name


@pytest.mark.parametrize("name", [b"", b" X", b"X ", b"X\xc3\xa9", b"X\x00", b"X:", b"X-Keyproxy\xadUser"])
def test_invalid_name_is_unreadable(name: bytes) -> None:
    assert FieldNames().kind(name) is Kind.UNREADABLE


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (b"X-Acme-User", Kind.RESERVED), (b"x_acme_user", Kind.RESERVED), (b"X-Keyproxy-User", Kind.PLAIN),
        (b"X-Acme-Act-For", Kind.ACT_FOR), (b"x_acme.act_for", Kind.ACT_FOR), (b"X-Keyproxy-Act-For", Kind.PLAIN),
    ],
)  # fmt: skip
def test_reserved_names_follow_the_configured_prefix(name: bytes, kind: Kind) -> None:
    assert FieldNames("X-Acme-").kind(name) is kind


def test_overrides_are_forwarded_if_configured_in_any_spelling() -> None:
    names = FieldNames(forward_overrides=True)
    for name in (b"X-HTTP-Method-Override", b"x_http_method_override", b"X.Original.URL", b"X-Rewrite-Url"):
        assert names.kind(name) is Kind.PLAIN
    assert names.kind(b"X_Api_Key") is Kind.DROPPED


def test_name_cache_is_bounded() -> None:
    names, sizes = FieldNames(), []
    for number in range(5_000):
        names.kind(b"X-%d" % number)
        sizes.append(len(names._remembered))
    assert 1 < max(sizes) <= 2048
    assert names.kind(b"X-Keyproxy-User") is Kind.RESERVED


def test_long_name_is_not_cached() -> None:
    names = FieldNames()
    assert names.kind(b"X-Keyproxy-" + b"a" * 30_000) is Kind.RESERVED
    assert names.kind(b"a" * 30_000) is Kind.PLAIN
    assert sum(map(len, names._remembered)) < 4096


@pytest.mark.parametrize(
    ("value", "is_sane"),
    [
        (b"a", True),
        (b"7b1d2c-4f:5/6+7=@._", True),
        (b"a" * 128, True),
        (b"a" * 129, False),
        (b"", False),
        (b"a b", False),
        (b"a,b", False),
        (b'a"b', False),
        (b"a\n", False),
        (b"a\x00", False),
        (b"\xc3\xa9", False),
        (b"${jndi}", False),
        (b"<b>", False),
    ],
)
def test_request_id_is_kept_if_it_is_safe_in_logs_and_headers(value: bytes, is_sane: bool) -> None:
    assert sane_request_id(value) is is_sane


def test_an_identity_block_is_one_line_for_each_value() -> None:
    values = [("User", "u_42"), ("Scope", "a b"), ("Empty", "")]
    assert identity_block("X-K-", values) == b"X-K-User: u_42\r\nX-K-Scope: a b\r\nX-K-Empty: \r\n"
    assert identity_block("X-K-", []) == b""


@pytest.mark.parametrize("value", ["a\r\nX-K-Test: true", "a\n", "a\r", "\x00", "\t", "\x7f", "ü", "\u2028"])
def test_identity_with_an_unsafe_value_is_rejected(value: str) -> None:
    with pytest.raises(ValueError, match="Scope"):
        identity_block("X-K-", [("User", "u"), ("Scope", value)])


def head(*forwarded: tuple[bytes, bytes], host: bytes | None = b"a.example") -> RequestHead:
    host_block = b"" if host is None else b"X-Forwarded-Host: %b\r\n" % host
    request = RequestHead(RequestLine(b"GET", b"/", b"/", 1, b""), RequestFields(host, host_block), b"", (), 0)
    request.forwarded = forwarded
    return request


CLAIMS = (
    (b"x-forwarded-for", b"192.0.2.1"),
    (b"x-forwarded-for", b"192.0.2.2, 192.0.2.3"),
    (b"x-forwarded-proto", b"https"),
    (b"x-forwarded-host", b"public.example"),
    (b"x-real-ip", b"192.0.2.1"),
)
OURS = b"X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: a.example\r\n"


@pytest.mark.parametrize("trusted", [[], ["10.0.0.2"], ["11.0.0.0/8"], ["unix"], ["::/0"]])
@pytest.mark.parametrize("claims", [(), CLAIMS], ids=["silent", "claiming"])
def test_claims_of_an_untrusted_peer_are_dropped(trusted: list[str], claims: tuple[tuple[bytes, bytes], ...]) -> None:
    forwarding = TrustRule(trusted).forwarding("10.0.0.1", is_tls=False)
    assert forwarding.block(head(*claims)) == OURS


@pytest.mark.parametrize("trusted", [["10.0.0.1"], ["10.0.0.0/8"], ["unix", "0.0.0.0/0"]])
def test_a_trusted_peer_s_claims_are_kept_and_its_address_added(trusted: list[str]) -> None:
    forwarding = TrustRule(trusted).forwarding("10.0.0.1", is_tls=False)
    assert forwarding.block(head()) == OURS
    assert forwarding.block(head(*CLAIMS)).split(b"\r\n") == [
        b"X-Forwarded-For: 192.0.2.1, 192.0.2.2, 192.0.2.3, 10.0.0.1",
        b"X-Forwarded-Proto: https",
        b"X-Forwarded-Host: public.example",
        b"X-Real-Ip: 192.0.2.1",
        b"",
    ]
    assert forwarding.block(head((b"x-forwarded-proto", b"https"), host=None)).split(b"\r\n") == [
        b"X-Forwarded-For: 10.0.0.1",
        b"X-Forwarded-Proto: https",
        b"",
    ]


@pytest.mark.parametrize(
    ("sent", "forwarded"),
    [
        ([b""], b"10.0.0.1"),
        ([b"", b""], b"10.0.0.1"),
        ([b"192.0.2.1,"], b"192.0.2.1, 10.0.0.1"),
        ([b", ,192.0.2.1 ,\t, 192.0.2.2"], b"192.0.2.1, 192.0.2.2, 10.0.0.1"),
        ([b"192.0.2.1", b"", b"unknown"], b"192.0.2.1, unknown, 10.0.0.1"),
    ],
)
def test_empty_claim_of_a_trusted_peer_is_left_out(sent: list[bytes], forwarded: bytes) -> None:
    claims = [(b"x-forwarded-for", value) for value in sent]
    empty = [(name, b"") for name in (b"x-forwarded-proto", b"x-forwarded-host", b"x-real-ip", b"forwarded")]
    block = b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: a.example\r\n" % forwarded
    assert TrustRule(["10.0.0.1"]).forwarding("10.0.0.1", is_tls=False).block(head(*claims, *empty)) == block
    assert TrustRule([]).forwarding("10.0.0.1", is_tls=False).block(head(*claims, *empty)) == OURS


def test_the_connections_of_one_peer_share_their_forwarding_and_those_of_others_do_not() -> None:
    rule = TrustRule(["10.0.0.0/8"])
    one = rule.forwarding("10.0.0.1", is_tls=False)
    assert rule.forwarding("10.0.0.1", is_tls=False) is one
    others = [
        rule.forwarding("10.0.0.1", is_tls=True), rule.forwarding("10.0.0.2", is_tls=False),
        rule.forwarding("10.0.0.1", is_tls=False, subject="CN=a"),
        rule.forwarding("10.0.0.1", is_tls=False, certificate_digest=b"d"),
        rule.forwarding("", is_tls=False), rule.forwarding("192.0.2.1", is_tls=False),
    ]  # fmt: skip
    assert len({id(other) for other in (one, *others)}) == 7
    assert [other.is_trusted for other in others] == [True, True, True, True, False, False]


def test_many_peers_are_each_known_by_their_own_address() -> None:
    rule = TrustRule([])
    for number in range(5_000):
        address = f"10.1.{number // 256}.{number % 256}"
        assert rule.forwarding(address, is_tls=False).client(None).address == address.encode()


@pytest.mark.parametrize(
    ("address", "trusted", "is_tls", "block"),
    [
        ("::ffff:10.0.0.1", ["10.0.0.0/8"], False, b"X-Forwarded-For: c, 10.0.0.1\r\nX-Forwarded-Proto: http\r\n"),
        ("::ffff:10.0.0.1", [], False, b"X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: http\r\n"),
        ("fe80::1%eth0", ["fe80::/10"], True, b"X-Forwarded-For: c, fe80::1\r\nX-Forwarded-Proto: https\r\n"),
        ("2001:db8::1", ["10.0.0.0/8"], True, b"X-Forwarded-For: 2001:db8::1\r\nX-Forwarded-Proto: https\r\n"),
        ("", ["unix"], False, b"X-Forwarded-For: c\r\nX-Forwarded-Proto: http\r\n"),
        ("", ["0.0.0.0/0", "::/0"], False, b"X-Forwarded-Proto: http\r\n"),
    ],
)
def test_trust_depends_on_the_actual_address_of_the_peer(
    address: str, trusted: list[str], is_tls: bool, block: bytes
) -> None:
    forwarding = TrustRule(trusted).forwarding(address, is_tls=is_tls)
    assert forwarding.block(head((b"x-forwarded-for", b"c"), host=None)) == block


@pytest.mark.parametrize("entry", ["", "localhost", "10.0.0.1/33", "10.0.0.1/8", "unix:/run/x", "10.0.0.0-10.0.0.9"])
def test_invalid_network_is_rejected(entry: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        TrustRule(["10.0.0.0/8", entry])
