"""Keys that the client makes. That they are the proxy's own is a test of the proxy."""

from __future__ import annotations

import hashlib

import pytest

from keyproxy_client import keys

ENTROPY = bytes(range(32))


@pytest.mark.parametrize("is_test", [False, True])
@pytest.mark.parametrize("prefix", ["kp", "a", "z9" * 8])
def test_key_that_was_made_is_parsed(prefix: str, is_test: bool) -> None:
    secret = keys.make(is_test=is_test, prefix=prefix, entropy=ENTROPY)
    assert len(secret) == len(prefix) + len("_live_") + 49
    assert keys.parse(secret) == keys.parse(secret, prefix=prefix) == keys.Key(prefix, is_test)
    assert keys.parse(secret, prefix="other") is None
    assert keys.digest(secret) == hashlib.sha256(secret.encode()).digest()
    assert secret.removeprefix(f"{prefix}_") not in keys.hint(secret, prefix=prefix)


def test_keys_are_random() -> None:
    assert len({keys.make() for _ in range(100)}) == 100


def test_every_single_change_of_a_key_is_detected() -> None:
    secret = keys.make(entropy=ENTROPY)
    for place in range(len("kp_live_"), len(secret)):
        changed = secret[:place] + ("a" if secret[place] != "a" else "b") + secret[place + 1 :]
        assert keys.parse(changed) is None


@pytest.mark.parametrize("text", ["", "kp_live_", "kp_live_" + "0" * 49, "kp_prod_" + "0" * 49, "x" * 57, "é" * 57])
def test_other_text_is_no_key(text: str) -> None:
    assert keys.parse(text) is None


@pytest.mark.parametrize("length", [0, 31, 33])
def test_key_needs_32_random_bytes(length: int) -> None:
    with pytest.raises(ValueError, match="32"):
        keys.make(entropy=b"x" * length)


@pytest.mark.parametrize("prefix", ["", "KP", "k_p", "9k", "k" * 17])
def test_prefix_is_one_that_the_proxy_accepts(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        keys.make(prefix=prefix)
