"""The table `[access]`: agent tokens and identity assertions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from keyproxy.auth.minting import MintRules


def _setting(default: Any, check: Callable[[Any], str | None] | None = None) -> Any:
    metadata = {"check": check, "secret": False}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _within(low: int, high: int) -> Callable[[Any], str | None]:
    return lambda value: None if low <= value <= high else f"must be at least {low} and at most {high}"


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """Agent tokens, and the assertions that upstreams verify.

    `audiences`: the first is that of this proxy and the default; tokens for the others are minted here, not accepted.
    """

    issuer: str = _setting("keyproxy")
    audiences: list[str] = _setting(["keyproxy"])
    agent_ttl_seconds: int = _setting(900, _within(60, 900))
    agent_depth_max: int = _setting(1, _within(0, 3))
    agent_tokens_max: int = _setting(1_000, _within(1, 1_000_000))
    assertion: bool = _setting(False)
    assertion_audience: str = _setting("upstream")
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
