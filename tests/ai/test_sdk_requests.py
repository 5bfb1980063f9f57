"""The bodies that the vendors' SDKs send are read for what their callers wrote. `sdk_requests.json` holds recordings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keyproxy.ai.models import Candidates
from keyproxy.ai.reservation import TokenRules, need_of
from tests.ai.requests_support import facts

RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "sdk_requests.json").read_text(encoding="utf-8"))

#: Endpoint, model, maximum, multiplier, whether it streams, images of high and low detail, reserved input and output.
READ = [
    ("/chat/completions", "gpt-4o", None, 1, False, 0, 0, 18, 4_096),
    ("/chat/completions", "gpt-4o", None, 2, True, 0, 1, 99, 8_192),
    ("/responses", "gpt-4o", 50, 1, False, 0, 0, 131_072, 50),
    ("/responses", "gpt-4o", None, 1, False, 1, 0, 1_512, 4_096),
    ("/embeddings", "e", None, 1, False, 0, 0, 8, 0),
    ("/moderations", None, None, 1, False, 0, 0, 8, 0),
    ("/audio/*", "tts", None, 1, False, 0, 0, 6, 4_096),
    ("/images/*", "i", None, 1, False, 0, 0, 5, 4_096),
    ("/completions", "c", None, 6, False, 0, 0, 6, 24_576),
    ("/messages", "claude-x", 50, 1, False, 1, 0, 5_822, 50),
    ("/messages/count_tokens", "claude-x", None, 1, False, 0, 0, 17, 0),
    (":generateContent", None, None, 2, False, 1, 0, 1_314, 8_192),
    (":streamGenerateContent", None, 7, 1, True, 0, 0, 9, 7),
    (":embedContent", None, None, 1, False, 0, 0, 8, 0),
    (":countTokens", None, None, 1, False, 0, 0, 9, 0),
    ("/api/chat", "llama3.2", None, 1, False, 0, 0, 18, 4_096),
    ("/api/generate", "llama3.2", None, 1, False, 1, 0, 4_808, 4_096),
    ("/api/embed", "e", None, 1, False, 0, 0, 5, 0),
    ("/converse", None, None, 1, False, 1, 0, 5_819, 4_096),
    ("/converse-stream", None, 9, 1, True, 0, 0, 3, 9),
]


@pytest.mark.parametrize(
    ("recorded", "expected"),
    list(zip(RECORDED, READ, strict=True)),
    ids=[f"{row['sdk']} {row['path']}" for row in RECORDED],
)
def test_a_request_of_an_sdk_is_read(recorded: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = facts(recorded["body"].encode(), recorded["dialect"], recorded["path"].encode())
    need = need_of(found, TokenRules(), Candidates(None))
    assert expected == (
        found.endpoint.name, found.model, found.maximum, found.multiplier, found.streams, found.media.images,
        found.media.low_detail_images, need.tokens_in, need.output_most,
    )  # fmt: skip
