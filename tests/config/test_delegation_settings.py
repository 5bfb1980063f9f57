"""The table [access]: every value that would weaken what is signed is refused, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from keyproxy.config import loader
from keyproxy.config.loader import ConfigError


def problems(access: str) -> list[str]:
    """The problems of a configuration with this table, without where it was set."""
    try:
        loader.load(Path("keyproxy.toml"), {}, read=f"[access]\n{access}\n")
    except ConfigError as error:
        return [problem.split(" (")[0] for problem in error.problems]
    return []


@pytest.mark.parametrize(
    "access",
    [
        "",
        'audiences = ["a", "b", "c", "d", "e", "f", "g", "h"]',
        f'issuer = "{"a" * 255}"',
        "agent_ttl_seconds = 60",
        "agent_ttl_seconds = 900",
        "agent_depth_max = 0",
        "agent_depth_max = 3",
        "assertion_ttl_seconds = 10",
        "assertion_ttl_seconds = 300",
        'assertion = true\nassertion_audience = "other"\nissuer = "https://proxy.example/"',
    ],
)
def test_values_within_their_bounds_are_accepted(access: str) -> None:
    assert problems(access) == []


@pytest.mark.parametrize(
    ("access", "problem"),
    [
        ('issuer = ""', "access.issuer: must not be empty"),
        ('issuer = "  "', "access.issuer: must not be empty"),
        (f'issuer = "{"a" * 256}"', "access.issuer: must have at most 255 characters"),
        ("audiences = []", "access.audiences: must have at least 1 and at most 8 entries"),
        (
            'audiences = ["a", "b", "c", "d", "e", "f", "g", "h", "i"]',
            "access.audiences: must have at least 1 and at most 8 entries",
        ),
        ('audiences = ["a", "b", "a"]', "access.audiences: must not have duplicates"),
        ('audiences = ["a", ""]', "access.audiences: an entry must not be empty"),
        ('assertion_audience = ""', "access.assertion_audience: must not be empty"),
        ('assertion_audience = "keyproxy"', "access.assertion_audience: must not be one of access.audiences"),
        (
            'audiences = ["a", "upstream"]',
            "access.assertion_audience: must not be one of access.audiences",
        ),
        ("agent_ttl_seconds = 59", "access.agent_ttl_seconds: must be at least 60 and at most 900"),
        ("agent_ttl_seconds = 901", "access.agent_ttl_seconds: must be at least 60 and at most 900"),
        ("agent_depth_max = -1", "access.agent_depth_max: must be at least 0 and at most 3"),
        ("agent_depth_max = 4", "access.agent_depth_max: must be at least 0 and at most 3"),
        ("agent_tokens_max = 0", "access.agent_tokens_max: must be at least 1 and at most 1000000"),
        ("assertion_ttl_seconds = 9", "access.assertion_ttl_seconds: must be at least 10 and at most 300"),
        ("assertion_ttl_seconds = 301", "access.assertion_ttl_seconds: must be at least 10 and at most 300"),
    ],
)
def test_a_value_out_of_bounds_is_named(access: str, problem: str) -> None:
    assert problems(access) == [problem]


def test_values_of_another_type_are_all_reported() -> None:
    assert len(problems('audiences = [1]\nassertion = "yes"\nissuer = 5')) == 3
