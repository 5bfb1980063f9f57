"""Lines of several workers on one pipe: writes of up to 4,096 bytes are atomic, so longer ones must not split lines."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator

import pytest

from keyproxy.metrics.access_log import AccessLog, _needs_portions, _portions


@pytest.mark.parametrize("lengths", [[1], [4095], [4096], [5000], [100] * 200, [4000, 4000], [10, 6000, 10]])
def test_lines_stay_whole_and_as_many_as_fit_go_together(lengths: list[int]) -> None:
    lines = b"".join(b"x" * (length - 1) + b"\n" for length in lengths)
    portions = list(_portions(lines))
    assert b"".join(portions) == lines
    assert all(portion.endswith(b"\n") for portion in portions if portion)
    longest = max(lengths)
    assert all(len(portion) <= max(4096, longest) for portion in portions)
    assert all(len(portion) <= 4096 or portion.count(b"\n") == 1 for portion in portions)


def test_a_pipe_keeps_that_much_together() -> None:
    reader, writer = os.pipe()
    try:
        assert os.fpathconf(writer, "PC_PIPE_BUF") >= 4096
    finally:
        os.close(reader)
        os.close(writer)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe's two ends."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_only_the_single_writer_of_a_pipe_that_blocks_writes_more_at_once(pipe: tuple[int, int]) -> None:
    writer = pipe[1]
    assert not _needs_portions(writer, has_siblings=False)
    assert _needs_portions(writer, has_siblings=True)
    os.set_blocking(writer, False)
    assert _needs_portions(writer, has_siblings=False)


def test_a_pipe_that_is_stderr_too_has_several_writers(pipe: tuple[int, int]) -> None:
    kept = os.dup(2)
    try:
        os.dup2(pipe[1], 2)
        assert _needs_portions(pipe[1], has_siblings=False)
        os.close(2)
        assert not _needs_portions(pipe[1], has_siblings=False)
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.mark.parametrize("has_siblings", [False, True])
def test_lines_that_exceed_a_pipe_arrive_complete_and_in_order(*, has_siblings: bool) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    lines = [b"%06d %s\n" % (number, b"x" * (number % 700)) for number in range(2_000)]
    read: list[bytes] = []

    def drain() -> None:
        while data := os.read(reader, 1_000):
            read.append(data)

    draining = threading.Thread(target=drain)
    draining.start()
    log = AccessLog(writer, wall_offset=lambda: 0.0, has_siblings=has_siblings)
    log.start()
    for start in range(0, len(lines), 400):
        log.write_line(b"".join(lines[start : start + 400]), 200)
    log.close()
    os.close(writer)
    draining.join(10.0)
    os.close(reader)
    assert b"".join(read) == b"".join(lines)
    assert log.dropped == 0
