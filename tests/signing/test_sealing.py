"""Sealed secrets: bound to their row, opened by any key of the file, and never quoted by an error."""

from __future__ import annotations

import base64
import copy
import traceback

import pytest

from keyproxy.signing.sealing import CannotOpen, KeyFileError, SealedPlace, SealingKeys

OLD, NEW = bytes(range(32)), bytes(range(1, 33))
PLACE = SealedPlace("openai", "acme", False, "pvk_1")
SECRET = b"sk-provider-secret"


def line(kid: str, key: bytes) -> str:
    """A line of a key file."""
    return f"{kid}:{base64.b64encode(key).decode()}\n"


def test_sealed_secret_opens_in_its_own_row() -> None:
    keys = SealingKeys({"k1": OLD})
    assert keys.open(keys.seal(SECRET, PLACE), "k1", PLACE) == SECRET


def test_the_first_key_seals_and_all_of_them_open() -> None:
    old = SealingKeys({"k1": OLD})
    both = SealingKeys.parse("# after a rotation\n\n" + line("k2", NEW) + line("k1", OLD))
    assert both.first == "k2"
    assert both.open(old.seal(SECRET, PLACE), "k1", PLACE) == SECRET
    with pytest.raises(CannotOpen, match="no key 'k2'"):
        old.open(both.seal(SECRET, PLACE), "k2", PLACE)


@pytest.mark.parametrize(
    "other",
    [
        PLACE._replace(provider="anthropic"),
        PLACE._replace(tenant_id="other"),
        PLACE._replace(tenant_id=None),
        PLACE._replace(is_test=True),
        PLACE._replace(row_id="pvk_2"),
    ],
)
def test_row_that_is_copied_elsewhere_does_not_open(other: SealedPlace) -> None:
    keys = SealingKeys({"k1": OLD})
    with pytest.raises(CannotOpen):
        keys.open(keys.seal(SECRET, PLACE), "k1", other)


def test_additional_data_is_unambiguous_for_tenants_with_separators() -> None:
    one = SealedPlace("p", "a|live|x", False, "pvk_1")
    other = SealedPlace("p", "a", False, "x|live|pvk_1")
    # The id of a row has no separator, so the second place does not exist.
    assert one.additional_data() == b"p|a|live|x|live|pvk_1"
    assert other.additional_data() != SealedPlace("p", "a|live", False, "x").additional_data()


def test_two_seals_of_one_secret_differ_and_have_the_documented_layout() -> None:
    keys = SealingKeys({"k1": OLD})
    first, second = keys.seal(SECRET, PLACE), keys.seal(SECRET, PLACE)
    assert first != second
    assert first[:1] == b"\x01"
    assert len(first) == 1 + 12 + len(SECRET) + 16


@pytest.mark.parametrize("place", [0, 1, 12, 13, 20, -1])
def test_changed_byte_does_not_open(place: int) -> None:
    keys = SealingKeys({"k1": OLD})
    sealed = bytearray(keys.seal(SECRET, PLACE))
    sealed[place] ^= 1
    with pytest.raises(CannotOpen):
        keys.open(bytes(sealed), "k1", PLACE)


@pytest.mark.parametrize("length", [0, 1, 5, 13, 28])
def test_cut_off_bytes_do_not_open(length: int) -> None:
    keys = SealingKeys({"k1": OLD})
    with pytest.raises(CannotOpen):
        keys.open(keys.seal(SECRET, PLACE)[:length], "k1", PLACE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment\n",
        base64.b64encode(OLD).decode(),
        line("k 1", OLD),
        line("", OLD),
        line("k1", OLD[:31]),
        line("k1", OLD + b"x"),
        "k1:" + "!" * 44,
        line("k1", OLD) + line("k1", NEW),
        line("k" * 65, OLD),
    ],
)
def test_invalid_key_file_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(KeyFileError) as refused:
        SealingKeys.parse(text)
    shown = "".join(traceback.format_exception(refused.value))
    for key in (OLD, NEW):
        assert base64.b64encode(key).decode()[:20] not in shown


def test_keys_are_neither_shown_nor_copied() -> None:
    keys = SealingKeys({"k1": OLD})
    assert repr(keys) == "SealingKeys(k1)"
    with pytest.raises(TypeError):
        copy.copy(keys)
