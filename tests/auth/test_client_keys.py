"""Keys that the client makes are those that keyproxy makes: the two distributions share the format and no code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keyproxy.auth.api_key import KeyFormat, SecretKey

_FILE = Path(__file__).parents[2] / "client" / "keyproxy_client" / "keys.py"
_ENTROPY = st.binary(min_size=32, max_size=32)
_PREFIXES = st.from_regex(r"[a-z][a-z0-9]{0,15}", fullmatch=True)


@pytest.fixture(scope="module")
def keys() -> ModuleType:
    """keyproxy_client.keys, which the environment of keyproxy does not install."""
    spec = importlib.util.spec_from_file_location("keyproxy_client_keys", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


@given(_ENTROPY, st.booleans(), _PREFIXES)
@example(bytes(32), False, "kp")
@example(b"\xff" * 32, True, "a" * 16)
def test_client_and_proxy_make_the_same_key_digest_and_hint(
    keys: ModuleType, entropy: bytes, is_test: bool, prefix: str
) -> None:
    ours = KeyFormat(prefix)
    made = ours.make(entropy, is_test=is_test)
    secret = keys.make(is_test=is_test, prefix=prefix, entropy=entropy)
    assert secret.encode("ascii") == made.reveal()
    assert keys.digest(secret) == made.digest()
    assert keys.hint(secret, prefix=prefix) == ours.hint(made)
    assert keys.parse(secret, prefix=prefix) == keys.Key(prefix, is_test)
    assert ours.may_exist(secret.encode("ascii"))


@given(_ENTROPY, st.integers(0, 56), st.sampled_from("0aZ_.\u00e9"))
def test_client_and_proxy_accept_the_same_keys(keys: ModuleType, entropy: bytes, place: int, letter: str) -> None:
    secret = keys.make(entropy=entropy)
    ours = KeyFormat(accepts_foreign=False)
    for changed in (secret, secret[:place] + letter + secret[place + 1 :], secret[:place], secret + letter):
        assert (keys.parse(changed, prefix="kp") is not None) is ours.may_exist(changed.encode("utf-8"))


@given(st.from_regex(r"[!-~]{4,60}", fullmatch=True))
@example("x" * 31)
@example("x" * 32)
def test_client_and_proxy_show_the_same_hint_of_a_foreign_key(keys: ModuleType, secret: str) -> None:
    assert keys.hint(secret) == KeyFormat().hint(SecretKey(secret.encode("ascii")))
