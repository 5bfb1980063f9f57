"""A sealed state reveals nothing, and opens only as it was sealed, with a secret of this server."""

from __future__ import annotations

import os

import pytest

from keyproxy.signing.state_sealing import StateSealer

OLD, NEW = b"o" * 32, b"n" * 32
TEXT = "a-ticket." + "x" * 3_000


def test_state_opens_as_it_was_sealed_and_during_a_rotation_of_the_secret() -> None:
    sealed = StateSealer((OLD,), os.urandom).seal(TEXT)
    assert StateSealer((OLD,), os.urandom).open(sealed) == TEXT
    assert StateSealer((NEW, OLD), os.urandom).open(sealed) == TEXT
    assert StateSealer((NEW,), os.urandom).open(sealed) is None


def test_state_reveals_neither_its_content_nor_that_it_is_repeated() -> None:
    sealer = StateSealer((OLD,), os.urandom)
    assert "ticket" not in sealer.seal(TEXT)
    assert sealer.seal(TEXT) != sealer.seal(TEXT)


def test_state_is_hardly_longer_than_a_ticket() -> None:
    ticket = os.urandom(1_500).hex()  # with fewer bits for each character than base64
    assert len(StateSealer((OLD,), os.urandom).seal(ticket)) < len(ticket)


@pytest.mark.parametrize("change", ["", "A", "é", "=", "A" * 70_000, "A" * 13, "a.b"])
def test_malformed_state_does_not_open(change: str) -> None:
    assert StateSealer((OLD,), os.urandom).open(change) is None


def test_altered_state_does_not_open() -> None:
    sealer = StateSealer((OLD,), os.urandom)
    sealed = sealer.seal(TEXT)
    for place in range(0, len(sealed) - 1, 7):
        altered = sealed[:place] + ("A" if sealed[place] != "A" else "B") + sealed[place + 1 :]
        assert sealer.open(altered) is None
