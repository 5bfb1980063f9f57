"""Signed assertions: what proves an identity, and what does not."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import json
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm

from keyproxy_client.asgi import IdentityMiddleware as AsgiMiddleware
from keyproxy_client.identity import Identity, Trust
from keyproxy_client.incoming.assertions import CACHED_MAX, AssertionVerifier
from keyproxy_client.incoming.judge import Judge, Outcome
from signing import STATED, TYPE, KeyServer, Signer, encoded

IDENTITY = Identity("u_42", "acme", frozenset({"jobs:read", "jobs:write"}), False, "key_7")

SIGNER = Signer("k1")


@pytest.fixture(scope="module")
def server() -> Iterator[KeyServer]:
    with KeyServer([SIGNER.jwk]).serving() as found:
        yield found


@pytest.fixture
def keys(server: KeyServer) -> KeyServer:
    """The server as new."""
    server.keys, server.status, server.fetches = [SIGNER.jwk], 200, 0
    return server


@pytest.fixture
def judge(keys: KeyServer) -> Judge:
    return Judge(Trust.signed(keys.url))


def scope(*assertions: str, plain: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """From a peer that no other rule trusts."""
    headers = [(f"x-keyproxy-{name}".lower().encode(), value.encode()) for name, value in (plain or {}).items()]
    headers += [(b"x-keyproxy-assertion", one.encode("latin-1")) for one in assertions]
    return {"type": "http", "client": ("203.0.113.9", 1), "server": ("10.0.0.1", 80), "headers": headers, **more}


def environ(assertion: str, plain: dict[str, str] | None = None) -> dict[str, Any]:
    names = {f"HTTP_X_KEYPROXY_{name.upper().replace('-', '_')}": value for name, value in (plain or {}).items()}
    return {"REQUEST_METHOD": "GET", "REMOTE_ADDR": "203.0.113.9", "HTTP_X_KEYPROXY_ASSERTION": assertion, **names}


def code(outcome: Outcome) -> str | None:
    assert (outcome.identity is None) is (outcome.problem is not None)
    assert outcome.is_trusted is (outcome.identity is not None)
    return None if outcome.problem is None else outcome.problem.code


@pytest.mark.parametrize("plain", [{}, STATED, {"User": "u_42"}, {**STATED, "Scope": "jobs:write jobs:read"}])
def test_valid_assertion_gives_its_identity_in_every_interface(judge: Judge, plain: dict[str, str]) -> None:
    assertion = SIGNER.sign()
    assert judge.wsgi(environ(assertion, plain)).identity == IDENTITY
    assert asyncio.run(judge.asgi(scope(assertion, plain=plain))).identity == IDENTITY
    assert judge.asgi_blocking(scope(assertion, plain=plain)).identity == IDENTITY


ACTS: list[tuple[Any, tuple[str | None, str | None]]] = [
    ({"sub": "u_worker", "type": "user", "key_id": "key_7"}, ("u_worker", None)),
    ({"sub": "crawler", "type": "agent"}, (None, "crawler")),
    ({"sub": "child", "type": "agent", "act": {"sub": "crawler", "type": "agent"}}, (None, "child")),
    ({"sub": "crawler", "type": "agent", "act": {"sub": "u_worker", "type": "user"}}, ("u_worker", "crawler")),
]


@pytest.mark.parametrize(("act", "expected"), ACTS)
def test_actor_and_current_agent_come_from_the_claim_act(judge: Judge, act: Any, expected: Any) -> None:
    identity = judge.wsgi(environ(SIGNER.sign(SIGNER.claims(act=act)))).identity
    assert identity is not None
    assert (identity.actor, identity.agent) == expected


CLAIMS: list[dict[str, Any]] = [
    {"iss": "other"}, {"iss": None}, {"aud": "keyproxy"}, {"aud": None}, {"aud": ["upstream"]},
    {"aud": ["upstream", "other"]}, {"sub": None}, {"sub": ""}, {"sub": "u_1,u_2"}, {"sub": 42}, {"tenant": None},
    {"tenant": ""}, {"scope": None}, {"scope": ["jobs:read"]}, {"scope": "a,b"}, {"test": None}, {"test": "false"},
    {"test": 0}, {"key_id": None}, {"key_id": "a b"}, {"exp": None}, {"iat": None}, {"exp": "soon"},
    {"exp": int(time.time()) - 3600}, {"iat": int(time.time()) + 3600}, {"nbf": int(time.time()) + 3600}, {"act": "u_1"},
    {"act": {"sub": "u_1"}}, {"act": {"sub": "u_1", "type": "group"}}, {"act": {"type": "user"}},
    {"act": {"sub": "u 1", "type": "user"}}, {"act": {"sub": "a|b", "type": "agent"}}, {"exp": float("inf")},
    {"act": {"sub": "u_1", "type": "user", "act": {"sub": "u_2", "type": "user"}}}, {"exp": 10**400},
    {"exp": "99999999999"},
]  # fmt: skip


@pytest.mark.parametrize("changed", CLAIMS, ids=str)
def test_signed_claims_that_keyproxy_does_not_issue_are_untrusted(judge: Judge, changed: dict[str, Any]) -> None:
    assert code(judge.wsgi(environ(SIGNER.sign(SIGNER.claims(**changed))))) == "identity_untrusted"


HEADERS: list[dict[str, Any]] = [
    {"typ": "JWT"}, {"typ": "at+jwt"}, {"typ": None}, {"typ": TYPE.upper()}, {"typ": f"application/{TYPE}"},
    {"kid": None}, {"kid": 7}, {"kid": ["k1"]}, {"kid": ""}, {"kid": "k" * 10_000}, {"kid": "k2"}, {"alg": "none"},
    {"alg": "None"}, {"alg": None}, {"alg": "es256"}, {"alg": "ES384"}, {"alg": "HS256"}, {"alg": ["ES256"]},
    {"crit": ["exp"]}, {"jku": "http://127.0.0.1/jwks.json"}, {"jwk": SIGNER.jwk}, {"x5c": ["MII"]}, {"b64": False},
    {"cty": "JWT"},
]  # fmt: skip


@pytest.mark.parametrize("changed", HEADERS, ids=lambda one: str(one)[:30])
def test_header_that_keyproxy_does_not_write_is_untrusted(judge: Judge, changed: dict[str, Any]) -> None:
    assert code(judge.wsgi(environ(SIGNER.sign(**changed)))) == "identity_untrusted"


def _hmac(secret: bytes) -> str:
    """An HS256 signature with the public key as the secret."""
    head, claims, _ = SIGNER.sign(alg="HS256").split(".")
    return f"{head}.{claims}.{encoded(hmac.digest(secret, f'{head}.{claims}'.encode(), 'sha256'))}"


def _signature(change: Callable[[bytes], bytes]) -> str:
    head, claims, signature = SIGNER.sign().split(".")
    raw = jwt.utils.base64url_decode(signature)
    return f"{head}.{claims}.{encoded(change(raw))}"


def _der(raw: bytes) -> bytes:
    return utils.encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))


_PUBLIC = SIGNER.private.public_key()
_PEM = _PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

FORGED: dict[str, Callable[[], str]] = {
    "another key with the same id": lambda: Signer("k1").sign(),
    "another key": lambda: Signer("foreign").sign(),
    "no signature": lambda: SIGNER.sign().rpartition(".")[0] + ".",
    "none": lambda: SIGNER.sign(alg="none").rpartition(".")[0] + ".",
    "public key as secret": lambda: _hmac(_PEM),
    "JWK as secret": lambda: _hmac(json.dumps(SIGNER.jwk).encode()),
    "empty secret": lambda: _hmac(b""),
    "DER signature": lambda: _signature(_der),
    "zero signature": lambda: _signature(lambda _: bytes(64)),
    "short signature": lambda: _signature(lambda raw: raw[:63]),
    "long signature": lambda: _signature(lambda raw: raw + b"\0"),
    "other claims": lambda: ".".join([
        SIGNER.sign().split(".")[0],
        encoded(json.dumps(SIGNER.claims(sub="u_admin")).encode()),
        SIGNER.sign().split(".")[2],
    ]),
    "header twice": lambda: SIGNER.sign() + "," + SIGNER.sign(),
    "an empty second header": lambda: SIGNER.sign() + ",",
    "padding": lambda: SIGNER.sign() + "==",
    "characters outside base64": lambda: SIGNER.sign()[:-3] + "*" + SIGNER.sign()[-3:],
    "white space": lambda: SIGNER.sign() + " ",
    "end of line": lambda: SIGNER.sign() + "\n",
    "four parts": lambda: SIGNER.sign() + ".e30",
    "empty": lambda: "",
    "words": lambda: "not a jwt",
    "dots": lambda: "..",
    "latin": lambda: "\xff.\xff.\xff",
    "nested header": lambda: encoded(b"[" * 5000) + ".e30.e30",
    "header is a list": lambda: encoded(b"[]") + ".e30.e30",
    "long": lambda: SIGNER.sign(SIGNER.claims(padding="x" * 20_000)),
    "agent token": lambda: SIGNER.sign(SIGNER.claims(aud="keyproxy"), typ="at+jwt"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORGED))
def test_forged_assertion_is_untrusted(judge: Judge, name: str) -> None:
    assertion = FORGED[name]()
    assert code(judge.asgi_blocking(scope(assertion))) == "identity_untrusted"
    assert code(judge.asgi_blocking(scope(SIGNER.sign()))) is None


def test_keys_of_other_kinds_in_the_jwks_verify_nothing(keys: KeyServer) -> None:
    p384 = json.loads(ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1()).public_key()))
    keys.keys = [
        {"kty": "oct", "kid": "k1", "k": encoded(b"secret"), "alg": "HS256"},
        {**p384, "kid": "k1"},
        {**SIGNER.jwk, "use": "enc"},
        {**SIGNER.jwk, "alg": "ES384"},
        {**SIGNER.jwk, "y": "AAAA"},
        {"kid": "k1"},
    ]
    assert code(Judge(Trust.signed(keys.url)).wsgi(environ(SIGNER.sign()))) == "identity_untrusted"


PLAIN: list[dict[str, str]] = [
    {"User": "u_admin"}, {"Tenant": "globex"}, {"Scope": "jobs:read jobs:write admin"}, {"Scope": ""}, {"Test": "true"},
    {"Key-Id": "key_8"}, {"Actor": "u_worker"}, {"Agent": "crawler"}, {"User": "u_42,u_42"}, {"Scope": "jobs:read"},
]  # fmt: skip


@pytest.mark.parametrize("changed", PLAIN, ids=str)
@pytest.mark.parametrize("rest", [STATED, {}])
def test_plain_headers_that_differ_from_the_claims_are_untrusted(
    judge: Judge, changed: dict[str, str], rest: dict[str, str]
) -> None:
    assertion = SIGNER.sign()
    assert code(judge.wsgi(environ(assertion))) is None
    assert code(judge.wsgi(environ(assertion, {**rest, **changed}))) == "identity_untrusted"
    assert code(judge.asgi_blocking(scope(assertion, plain={**rest, **changed}))) == "identity_untrusted"


def test_repeated_assertion_or_header_is_untrusted(judge: Judge) -> None:
    assertion = SIGNER.sign()
    assert code(judge.asgi_blocking(scope(assertion, assertion))) == "identity_untrusted"
    for name in (b"x_keyproxy_assertion", b"x_keyproxy_user", b"x-keyproxy-user"):
        found = scope(assertion, plain=STATED)
        found["headers"].append((name, b"u_42"))
        assert code(judge.asgi_blocking(found)) == "identity_untrusted"


def test_plain_headers_of_an_untrusted_assertion_are_removed(keys: KeyServer) -> None:
    seen = []

    async def app(found: Any, *_: Any) -> None:
        seen.append((found["headers"], found["state"]))

    given = scope(Signer("k1").sign(), plain=STATED)
    asyncio.run(AsgiMiddleware(app, trust=Trust.signed(keys.url))(given, None, None))  # type: ignore[arg-type]
    assert seen == [([], {"identity": None})]


@pytest.mark.parametrize("plain", [{}, STATED])
def test_request_without_assertion_has_no_identity_and_causes_no_fetch(
    judge: Judge, keys: KeyServer, plain: dict[str, str]
) -> None:
    assert code(judge.asgi_blocking(scope(plain=plain))) == "identity_missing"
    assert keys.fetches == 0


def test_peer_that_other_rules_trust_needs_an_assertion_too(judge: Judge) -> None:
    found = scope(plain=STATED, client=("127.0.0.1", 40_000), server=("/run/app.sock", None))
    assert code(judge.asgi_blocking({**found, "client": ("127.0.0.1", 40_000)})) == "identity_missing"


@pytest.mark.parametrize(("seconds", "expected"), [(-3, None), (-7, "identity_untrusted")])
def test_expiry_has_a_leeway_of_five_seconds(judge: Judge, seconds: int, expected: str | None) -> None:
    assertion = SIGNER.sign(SIGNER.claims(exp=int(time.time()) + seconds))
    assert code(judge.wsgi(environ(assertion))) == expected


def test_cached_assertion_ends_with_its_leeway(keys: KeyServer) -> None:
    now = [time.time()]
    verifier = AssertionVerifier(keys.url, issuer="keyproxy", audience="upstream", now_wall=lambda: now[0])
    judge = Judge(Trust(verifier=verifier))
    expires = int(now[0]) + 30
    assertion = SIGNER.sign(SIGNER.claims(exp=expires))
    assert code(judge.wsgi(environ(assertion))) is None
    # From here on nothing can be verified: only the cache knows the assertion.
    keys.keys = []
    verifier.key_sets = Judge(Trust.signed(keys.url))._trust.verifier.key_sets  # type: ignore[misc, union-attr]
    now[0] = expires + 4.9
    assert code(judge.wsgi(environ(assertion))) is None
    now[0] = expires + 5.0
    assert code(judge.wsgi(environ(assertion))) == "identity_untrusted"


def test_without_keys_the_middleware_responds_with_503(keys: KeyServer) -> None:
    keys.status = 503
    app_calls = []

    async def app(*arguments: Any) -> None:
        app_calls.append(arguments)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    middleware = AsgiMiddleware(app, trust=Trust.signed(keys.url))
    asyncio.run(middleware(scope(SIGNER.sign()), None, send))  # type: ignore[arg-type]
    assert (sent[0]["status"], dict(sent[0]["headers"])[b"retry-after"]) == (503, b"5")
    assert json.loads(sent[1]["body"])["code"] == "identity_unverifiable"
    assert app_calls == []
    asyncio.run(middleware(scope(), None, send))  # type: ignore[arg-type]
    assert len(app_calls) == 1


def test_new_key_of_a_proxy_is_fetched_once(judge: Judge, keys: KeyServer) -> None:
    assert code(judge.wsgi(environ(SIGNER.sign()))) is None
    second = Signer("k2")
    keys.keys.append(second.jwk)
    assert code(judge.wsgi(environ(second.sign()))) is None
    assert keys.fetches == 2
    for number in range(50):
        assert code(judge.wsgi(environ(Signer(f"x{number}").sign()))) == "identity_untrusted"
    assert keys.fetches == 2


def test_cache_of_verified_assertions_is_bounded_and_correct(judge: Judge) -> None:
    trust = judge._trust
    for number in range(CACHED_MAX + 10):
        identity = judge.wsgi(environ(SIGNER.sign(SIGNER.claims(sub=f"u_{number}")))).identity
        assert identity is not None
        assert identity.user == f"u_{number}"
    assert f"{CACHED_MAX} verified" in repr(trust)


def test_threads_verify_at_the_same_time(judge: Judge, keys: KeyServer) -> None:
    assertions = [SIGNER.sign(SIGNER.claims(sub=f"u_{number}")) for number in range(40)]
    barrier = threading.Barrier(8)

    def check(number: int) -> bool:
        barrier.wait(5)
        users = [judge.wsgi(environ(one)).identity for one in assertions]
        return [one.user for one in users if one] == [f"u_{number}" for number in range(40)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(8)))
    assert keys.fetches == 1


def test_event_loop_runs_while_keys_are_fetched(keys: KeyServer) -> None:
    trust = Trust.signed(keys.url)
    assert trust.verifier is not None
    fetcher = trust.verifier.key_sets._fetcher
    goes_on = threading.Event()
    fetch = fetcher.fetch

    def slow() -> tuple[Any, float]:
        assert goes_on.wait(5)
        return fetch()

    fetcher.fetch = slow  # type: ignore[method-assign]

    async def run() -> list[str | None]:
        judge = Judge(trust)
        waiting = [asyncio.ensure_future(judge.asgi(scope(SIGNER.sign()))) for _ in range(20)]
        cancelled = asyncio.ensure_future(judge.asgi(scope(SIGNER.sign())))
        await asyncio.sleep(0)
        cancelled.cancel()
        # The loop is free: this runs before the fetch ends.
        goes_on.set()
        return [code(one) for one in await asyncio.gather(*waiting)]

    assert asyncio.run(run()) == [None] * 20
    assert keys.fetches == 1


@pytest.mark.parametrize("arguments", [{"issuer": ""}, {"audience": ""}, {"jwks_url": "file:///etc/passwd"}])
def test_signed_with_invalid_values_is_refused(arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Trust.signed(**{"jwks_url": "https://keyproxy/jwks.json", **arguments})


def test_repr_shows_no_assertion(judge: Judge) -> None:
    assertion = SIGNER.sign()
    outcome = judge.wsgi(environ(assertion))
    assert assertion not in repr((judge, outcome, judge._trust))


@pytest.mark.once
def test_verified_assertion_takes_at_most_three_microseconds_again(judge: Judge) -> None:
    assertion = SIGNER.sign()
    judge.wsgi(environ(assertion))
    verifier = judge._trust.verifier
    assert verifier is not None
    seconds = min(timeit.repeat(lambda: verifier.identity(assertion, may_fetch=True), number=100, repeat=50)) / 100
    assert seconds <= 3e-6
