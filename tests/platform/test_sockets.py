"""Bound sockets: modes of unix sockets, shared and exclusive ports."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyproxy.platform import sockets


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path, since the length of a socket path is bounded."""
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_a_unix_socket_has_its_mode_whatever_the_umask(directory: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        with contextlib.closing(sockets.bind(f"unix:{directory}/a.sock", mode=mode)):
            assert stat.S_IMODE((directory / "a.sock").stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_unix_socket_is_never_wider_than_its_mode(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even between the creation of its file and the chmod, which the test disables."""
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    before = os.umask(0)
    try:
        with contextlib.closing(sockets.bind(f"unix:{directory}/a.sock", mode=0o600)):
            assert stat.S_IMODE((directory / "a.sock").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_exclusive_bind_to_a_shared_port_is_refused(directory: Path) -> None:
    with contextlib.closing(sockets.bind("127.0.0.1:0")) as shared:
        shared.listen()
        address = sockets.address_of(shared)
        with contextlib.closing(sockets.bind(address)):
            pass
        with pytest.raises(sockets.BindError, match="in use"):
            sockets.bind(address, is_shared=False)
