"""Lines of several workers on one pipe: writes of up to 4,096 bytes are atomic, so longer ones must not split lines."""

from __future__ import annotations

import os

import pytest

from keyproxy.metrics.access_log import _portions


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
