"""Reading the identity headers, from each kind of interface."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest

from keyproxy_client.identity import Identity, IdentityInvalid, read

STATED = {"User": "u_42", "Tenant": "acme", "Scope": "jobs:read jobs:write", "Test": "false", "Key-Id": "key_7"}
IDENTITY = Identity("u_42", "acme", frozenset({"jobs:read", "jobs:write"}), False, "key_7")


def pairs(stated: dict[str, str] | None = None, *more: tuple[bytes, bytes], prefix: str = "X-Keyproxy-") -> Any:
    """As an ASGI server passes them."""
    own = STATED if stated is None else stated
    found = [((prefix + name).lower().encode(), value.encode("latin-1")) for name, value in own.items()]
    return [(b"host", b"compute"), (b"x-forwarded-for", b"192.0.2.1"), *found, *more]


def environ(stated: dict[str, str] | None = None, **more: str) -> dict[str, Any]:
    """As a WSGI server passes them."""
    own = STATED if stated is None else stated
    names = {f"HTTP_X_KEYPROXY_{name.upper().replace('-', '_')}": value for name, value in own.items()}
    return {"REQUEST_METHOD": "GET", "HTTP_HOST": "compute", **names, **more}


def quickest_seconds(call: Callable[[], object], enough_seconds: float) -> float:
    """The least time per call in short runs, which a busy machine interrupts less; until that is enough, or for 2 s."""
    deadline = time.monotonic() + 2.0
    best = float("inf")
    while best > enough_seconds and time.monotonic() < deadline:
        best = min(best, timeit.timeit(call, number=100) / 100)
    return best


def forms(stated: dict[str, str]) -> list[Any]:
    """The same headers in each form that `read` accepts."""
    in_environ = environ(stated)
    del in_environ["REQUEST_METHOD"]
    return [
        pairs(stated),
        environ(stated),
        in_environ,
        {f"X-Keyproxy-{name}": value for name, value in stated.items()},
        {f"x-keyproxy-{name}".lower(): value for name, value in stated.items()},
        MappingProxyType({f"X-Keyproxy-{name}": value for name, value in stated.items()}),
        MappingProxyType(environ(stated)),
    ]


@pytest.mark.parametrize("form", range(7))
def test_each_form_of_headers_gives_the_same_identity(form: int) -> None:
    assert read(forms(STATED)[form]) == IDENTITY


@pytest.mark.parametrize("form", range(7))
def test_actor_agent_test_mode_and_no_scopes_are_read(form: int) -> None:
    stated = {**STATED, "Scope": "", "Test": "true", "Actor": "u_worker", "Agent": "crawler"}
    assert read(forms(stated)[form]) == Identity("u_42", "acme", frozenset(), True, "key_7", "u_worker", "crawler")


@pytest.mark.parametrize("scopes", [["b", "a"], ("a", "b"), {"a", "b"}, "a b", iter("ab")])
def test_scopes_of_an_identity_are_a_set_whatever_they_are_made_from(scopes: Any) -> None:
    identity = Identity("u_1", "acme", scopes, False, "key_1", None, None)
    assert identity == Identity("u_1", "acme", frozenset({"a", "b"}), False, "key_1")
    assert isinstance(identity.scopes, frozenset)
    assert len({identity, identity}) == 1


def test_part_of_a_scope_is_no_scope_of_an_identity() -> None:
    assert "jobs:write" not in Identity("u_1", "acme", "jobs:write-all", False, "key_1").scopes  # type: ignore[arg-type]


@pytest.mark.parametrize("headers", [[], {}, pairs({}), environ({}), {"Host": "compute"}])
def test_headers_without_identity_give_none(headers: Any) -> None:
    assert read(headers) is None


def test_headers_that_concern_the_request_state_no_identity() -> None:
    assert read(pairs({"Model": "m", "Client-Cert-Subject": "CN=a", "Token-Id": "agt_1"})) is None


@pytest.mark.parametrize("missing", list(STATED))
@pytest.mark.parametrize("form", range(7))
def test_incomplete_set_is_invalid(missing: str, form: int) -> None:
    stated = {name: value for name, value in STATED.items() if name != missing}
    with pytest.raises(IdentityInvalid):
        read(forms(stated)[form])


@pytest.mark.parametrize("name", ["Actor", "Agent"])
def test_actor_alone_is_an_incomplete_set(name: str) -> None:
    with pytest.raises(IdentityInvalid):
        read(pairs({name: "u_42"}))


@pytest.mark.parametrize("name", [*STATED, "Actor", "Agent", "Assertion"])
@pytest.mark.parametrize(
    "spelling", ["X-Keyproxy-{}", "x-keyproxy-{}", "X_Keyproxy_{}", "x.keyproxy.{}", "x-keyproxy_{}"]
)
def test_repeated_header_is_invalid_in_every_spelling(name: str, spelling: str) -> None:
    stated = {**STATED, name: STATED.get(name, "u_1")}
    again = (spelling.format(name).encode(), stated[name].encode())
    with pytest.raises(IdentityInvalid):
        read(pairs(stated, again))


def test_header_in_a_spelling_that_keyproxy_never_uses_is_invalid() -> None:
    with pytest.raises(IdentityInvalid):
        read(pairs({}, *[(f"x_keyproxy_{name}".lower().encode(), value.encode()) for name, value in STATED.items()]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("User", "u_1,u_2"), ("User", "u_1, u_2"), ("User", ""), ("User", " u_1"), ("User", "u_1\n"), ("User", "ü"),
        ("User", "-u"), ("User", "u" * 129), ("User", "u/1"), ("Tenant", "acme,acme"), ("Tenant", "a b"),
        ("Scope", "a,b"), ("Scope", "a  b"), ("Scope", " a"), ("Scope", "a "), ("Scope", "a\tb"), ("Scope", "*"),
        ("Scope", "s" * 65), ("Scope", " ".join(["s"] * 129)), ("Test", "True"), ("Test", "1"), ("Test", ""),
        ("Test", "true,false"), ("Key-Id", "key_7,key_7"), ("Actor", ""), ("Actor", "u_1,u_2"), ("Agent", ""),
        ("Agent", "a|b"), ("Agent", "a" * 65),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", range(7))
def test_value_outside_the_patterns_is_invalid_and_not_shown(name: str, value: str, form: int) -> None:
    with pytest.raises(IdentityInvalid) as caught:
        read(forms({**STATED, name: value})[form])
    assert len(value) < 3 or value not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("User", "u" * 128), ("User", "a@example.org"), ("User", "auth0|5+6"), ("Scope", "s" * 64),
        ("Scope", " ".join(["s"] * 128)), ("Key-Id", "ses_0123456789abcdefghijkl"), ("Agent", "a" * 64),
        ("Actor", "u:1"),
    ],
)  # fmt: skip
def test_value_at_the_bound_of_a_pattern_is_valid(name: str, value: str) -> None:
    assert read(pairs({**STATED, name: value})) is not None


@pytest.mark.parametrize("value", [["u_1"], None, 42, object()])
def test_value_of_another_type_is_invalid(value: Any) -> None:
    with pytest.raises(IdentityInvalid):
        read({**{f"X-Keyproxy-{name}": one for name, one in STATED.items()}, "X-Keyproxy-User": value})


@pytest.mark.parametrize("marker", [{}, {"REQUEST_METHOD": "GET"}, {"REQUEST_METHOD": "GET", "wsgi.version": "(1, 0)"}])
def test_headers_that_a_client_names_like_variables_of_wsgi_state_no_identity(marker: dict[str, str]) -> None:
    own = {"HOST": "compute", "X-Request-Id": "1", "X-Forwarded-Proto": "http"}
    sent = {name: value for name, value in environ().items() if name.startswith("HTTP_X_KEYPROXY_")}
    assert read({**own, **marker, **sent}) is None
    assert read([(name, value) for name, value in {**own, **marker, **sent}.items()]) is None
    assert read([(name.encode(), value.encode()) for name, value in sent.items()]) is None
    named = {f"X-Keyproxy-{name}": value for name, value in STATED.items()}
    assert read({**own, **marker, **sent, **named, "HTTP_X_KEYPROXY_USER": "u_1"}) == IDENTITY


def test_whole_environ_of_a_server_is_read_as_one() -> None:
    assert read({**environ(), "wsgi.version": (1, 0), "some-server.option": "1"}) == IDENTITY


def test_other_prefix_is_read_and_the_default_one_is_then_no_identity() -> None:
    assert read(pairs(prefix="X-Gate-"), prefix="X-Gate-") == IDENTITY
    assert read(pairs(), prefix="X-Gate-") is None
    named = {key.replace("KEYPROXY", "GATE"): value for key, value in environ().items()}
    assert read(named, prefix="X-Gate-") == IDENTITY


@pytest.mark.parametrize("prefix", ["", "X-", "Keyproxy-", "X-Keyproxy", "X-Key_proxy-", "X-ü-", "X-a-\n"])
def test_prefix_that_the_proxy_refuses_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        read([], prefix=prefix)


def test_many_names_and_identities_are_forgotten_without_harm() -> None:
    for number in range(5000):
        stated = {**STATED, "User": f"u_{number}"}
        found = read(pairs(stated, (f"x-other-{number}".encode(), b"1")))
        assert found is not None
        assert found.user == f"u_{number}"
    with pytest.raises(IdentityInvalid):
        read(pairs(None, (b"x_keyproxy_user", b"u_42")))


@pytest.mark.once
@pytest.mark.parametrize("headers", [pairs(), environ(), {**environ(), "wsgi.version": (1, 0)}])
def test_reading_takes_at_most_three_microseconds(headers: Any) -> None:
    assert quickest_seconds(lambda: read(headers), 3e-6) <= 3e-6
