"""Keys: their format, what is recognised as one, and that they are not shown."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.auth.api_key import KeyFormat, SecretKey, is_access_token
from keyproxy.auth.base62 import ALPHABET, base62

OURS = KeyFormat()
OURS_ONLY = KeyFormat(accepts_foreign=False)
ZERO = b"kp_live_00000000000000000000000000000000000000000000eh5Wc"
ONES = b"kp_test_yhjskwdA6OZ1AL1YmHWZWm8LLG7HjnuCA2j5rOw8Xp12emeUk"

entropies = st.binary(min_size=32, max_size=32)


@pytest.mark.parametrize(("entropy", "is_test", "key"), [(bytes(32), False, ZERO), (b"\xff" * 32, True, ONES)])
def test_the_format_never_changes(entropy: bytes, is_test: bool, key: bytes) -> None:
    made = OURS.make(entropy, is_test=is_test)
    assert made.reveal() == key
    assert made.digest() == hashlib.sha256(key).digest()


@given(entropies, st.booleans(), st.sampled_from(["kp", "a", "x1234567890abcde"]))
def test_made_key_may_exist_and_contains_all_of_its_entropy(entropy: bytes, is_test: bool, prefix: str) -> None:
    key_format = KeyFormat(prefix, accepts_foreign=False)
    key = key_format.make(entropy, is_test=is_test).reveal()
    digits = key[-49:-6]
    assert key.startswith(b"%b_%b_" % (prefix.encode(), b"test" if is_test else b"live"))
    assert len(key) == len(prefix) + 6 + 43 + 6
    assert sum(ALPHABET.index(digit) * 62**place for place, digit in enumerate(digits[::-1])) == int.from_bytes(entropy)
    assert key_format.may_exist(key)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_is_made_of_32_bytes_only(length: int) -> None:
    with pytest.raises(ValueError, match="32 random bytes"):
        OURS.make(bytes(length), is_test=False)


@given(entropies, st.integers(0, 56), st.sampled_from(ALPHABET), st.sampled_from(["replace", "drop", "double", "swap"]))
def test_a_mistyped_key_may_not_exist(entropy: bytes, place: int, digit: int, mistake: str) -> None:
    key = OURS.make(entropy, is_test=False).reveal()
    wrong = {
        "replace": key[:place] + bytes([digit]) + key[place + 1 :],
        "drop": key[:place] + key[place + 1 :],
        "double": key[: place + 1] + key[place:],
        "swap": key[:place] + key[place : place + 2][::-1] + key[place + 2 :],
    }[mistake]
    assert OURS_ONLY.may_exist(wrong) == (wrong == key)
    # With an intact start it still counts as a keyproxy key, not as a foreign one.
    if place >= len(b"kp_live_"):
        assert OURS.may_exist(wrong) == (wrong == key)


@pytest.mark.parametrize(
    ("plaintext", "may_exist"),
    [
        (b"a" * 7, False),
        (b"a" * 8, True),
        (b"a" * 512, True),
        (b"a" * 513, False),
        (b"sk-proj-aZ09_~+/=:@!#$%&'*.^`|?", True),
        (b"with space", False),
        (b"with,comma", False),
        (b"with;semicolon", False),
        (b'with"quote', False),
        (b"with\ttab1", False),
        (b"with\x00nul", False),
        (b"with\xc3\xa9accent", False),
        (b"trailing\n", False),
        (ZERO, True),
        (ZERO.upper(), False),
        (ZERO + b"\n", False),
        (b" " + ZERO, False),
        (b"kp_live_", False),
        (b"kp_prod_" + ZERO[8:], True),
        (b"", False),
    ],
)
def test_a_foreign_key_may_exist_if_it_is_a_word_of_8_to_512_characters(plaintext: bytes, may_exist: bool) -> None:
    assert OURS.may_exist(plaintext) is may_exist
    assert OURS_ONLY.may_exist(plaintext) is (plaintext == ZERO)


def test_a_secret_of_oauth_under_another_prefix_is_no_foreign_key() -> None:
    former = KeyFormat("acme")
    for make in (former.make_access_token, former.make_refresh_token, former.make_client_secret):
        secret = make(bytes(32)).reveal()
        assert not OURS.may_exist(secret)
        # Another program's key, which happens to look like that, has no such checksum.
        assert OURS.may_exist(secret[:-1] + b"~")
        assert OURS.may_exist(secret[:-1] + (b"1" if secret.endswith(b"0") else b"0"))


@pytest.mark.parametrize(
    ("text", "is_within"),
    [
        (ZERO, True),
        (b"/a/" + ONES + b"/b", True),
        (ZERO.upper(), True),
        (b"x" + ZERO.lower() + b"y", True),
        (ZERO[: 8 + 16], True),
        (ZERO[: 8 + 15], False),
        (b"/docs/kp_live_keys", False),
        (b"kp_prod_" + ZERO[8:], False),
        (b"sk_live_" + ZERO[8:], False),
        (b"", False),
    ],
)
def test_our_keys_are_found_anywhere_in_any_case_from_16_digits_on(text: bytes, is_within: bool) -> None:
    assert OURS.is_within(text) is is_within


@pytest.mark.parametrize(("key", "hint"), [(ZERO, "kp_live_0000…h5Wc"), (ONES, "kp_test_yhjs…meUk")])
def test_a_hint_is_the_start_and_the_last_four(key: bytes, hint: str) -> None:
    assert OURS.hint(SecretKey(key)) == hint


@pytest.mark.parametrize("plaintext", [ZERO, b"a-foreign-key-of-some-length", b"abcd1234"])
def test_a_hint_leaves_at_least_half_of_the_secret_unknown(plaintext: bytes) -> None:
    secret = plaintext.removeprefix(b"kp_live_")
    shown = OURS.hint(SecretKey(plaintext)).removeprefix("kp_live_").replace("…", "")
    assert len(shown) <= len(secret) // 2


@pytest.mark.parametrize(
    "show",
    [
        repr, str, ascii, "{}".format, "{:>80}".format, lambda key: f"{key!s}{key!r}", "%s".__mod__,
        lambda key: str([key, {1: key}]), lambda key: str(ValueError(key)), lambda key: str(dir(key)),
    ],
)  # fmt: skip
def test_key_is_never_displayed(show: Callable[[SecretKey], str]) -> None:
    assert ZERO[8:].decode() not in show(SecretKey(ZERO))


@pytest.mark.parametrize(
    "leak",
    [
        pickle.dumps, copy.copy, copy.deepcopy, json.dumps, hash, vars, bytes,
        lambda key: key == SecretKey(ZERO), lambda key: key != ZERO, [ZERO].count,
    ],
)  # fmt: skip
def test_key_cannot_be_copied_serialised_or_compared(leak: Callable[[SecretKey], object]) -> None:
    with pytest.raises(TypeError) as error:
        leak(SecretKey(ZERO))
    assert ZERO[8:].decode() not in str(error.value)


@given(entropies, st.sampled_from(["kp", "a", "x1234567890abcde"]))
def test_only_a_whole_access_token_is_one_and_it_is_never_a_key(entropy: bytes, prefix: str) -> None:
    made = KeyFormat(prefix)
    token = made.make_access_token(entropy).reveal()
    assert is_access_token(token)
    assert made.may_be_access_token(token)
    assert not any(one.may_exist(token) for one in (made, OURS, OURS_ONLY))
    others = (made.make_refresh_token, made.make_client_secret, made.make_admin_token)
    assert not any(is_access_token(make(entropy).reveal()) for make in others)
    assert not is_access_token(made.make(entropy, is_test=False).reveal())


@pytest.mark.parametrize(
    "plaintext",
    [
        b"",
        b"_access_",
        b"kp_access_" + ZERO[-49:],
        OURS.make_access_token(bytes(32)).reveal()[:-1],
        OURS.make_access_token(bytes(32)).reveal() + b"0",
        OURS.make_access_token(bytes(32)).reveal()[:-1] + b"z",
        b"K" + OURS.make_access_token(bytes(32)).reveal(),
        b"." + OURS.make_access_token(bytes(32)).reveal(),
    ],
)
def test_what_is_no_whole_access_token_is_looked_up_as_a_key_if_at_all(plaintext: bytes) -> None:
    assert not is_access_token(plaintext)
    assert not OURS.may_be_access_token(plaintext)


@given(st.binary())
def test_checksum_is_the_crc_in_base62(body: bytes) -> None:
    assert KeyFormat.has_right_checksum(body + base62(zlib.crc32(body), 6))
