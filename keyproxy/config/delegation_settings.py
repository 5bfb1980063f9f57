"""The table `[access]`: agent tokens and identity assertions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from keyproxy.auth.minting import MintRules

_AUDIENCES_MAX: Final = 8
_NAME_CHARACTERS_MAX: Final = 255


def _setting(default: Any, check: Callable[[Any], str | None] | None = None) -> Any:
    metadata = {"check": check, "secret": False}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _within(low: int, high: int) -> Callable[[Any], str | None]:
    return lambda value: None if low <= value <= high else f"must be at least {low} and at most {high}"


def _name(value: str) -> str | None:
    if not value.strip():
        return "must not be empty"
    return None if len(value) <= _NAME_CHARACTERS_MAX else f"must have at most {_NAME_CHARACTERS_MAX} characters"


def _names(values: list[str]) -> str | None:
    if not 1 <= len(values) <= _AUDIENCES_MAX:
        return f"must have at least 1 and at most {_AUDIENCES_MAX} entries"
    if len(set(values)) < len(values):
        return "must not have duplicates"
    return next((f"an entry {fault}" for value in values if (fault := _name(value))), None)


def conflicts(access: AccessSettings) -> list[str]:
    """The contradictions between keys of the table that are valid individually."""
    if access.assertion_audience in access.audiences:
        # Otherwise an assertion could pass for an agent token where only `aud` is verified.
        return ["access.assertion_audience: must not be one of access.audiences"]
    return []


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """Agent tokens, and the assertions that upstreams verify.

    `audiences`: the first is that of this proxy and the default; tokens for the others are minted here, not accepted.
    """

    issuer: str = _setting("keyproxy", _name)
    audiences: list[str] = _setting(["keyproxy"], _names)
    agent_ttl_seconds: int = _setting(900, _within(60, 900))
    agent_depth_max: int = _setting(1, _within(0, 3))
    agent_tokens_max: int = _setting(1_000, _within(1, 1_000_000))
    assertion: bool = _setting(False)
    assertion_audience: str = _setting("upstream", _name)
    assertion_ttl_seconds: int = _setting(60, _within(10, 300))

    def mint_rules(self) -> MintRules:
        """The bounds of agent tokens."""
        return MintRules(
            audiences=tuple(self.audiences),
            ttl_seconds_max=self.agent_ttl_seconds,
            depth_max=self.agent_depth_max,
            tokens_max=self.agent_tokens_max,
            issuer=self.issuer,
        )
