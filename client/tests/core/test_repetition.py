"""What a response may contain without an effect on the caller but that it is returned."""

from __future__ import annotations

import pytest

from keyproxy_client.outgoing.repetition import Repetitions, is_refusal, retry_after_seconds


@pytest.mark.parametrize(
    "body",
    [b"[" * 60_000, b'{"code":' + b"9" * 5_000 + b"}", b'{"code":["overloaded"]}', b'{"error":[]}', b"\xff", b""],
)
def test_body_that_no_parser_takes_is_no_refusal(body: bytes) -> None:
    assert not is_refusal(body)


@pytest.mark.parametrize(
    "value",
    [
        "Mon, 99 Jan 99999999999999999999 00:00:00 +2300", "Mon, 01 Jan 0001 00:00:00 +9999", "nan", "-5", "1e3",
        "\u0665", "0, 0", "",
    ],
)  # fmt: skip
def test_malformed_retry_after_is_none(value: str) -> None:
    assert retry_after_seconds(value) is None


def test_length_of_any_size_raises_nothing() -> None:
    headers = {"retry-after": "0", "content-type": "application/json", "content-length": "9" * 5_000}
    assert Repetitions(5.0).wait_seconds(429, headers.get) is None
