"""Signals of unusual use of a key: `[anomalies]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from keyproxy.config import value_checks
from keyproxy.config.value_checks import within
from keyproxy.config.value_types import setting

SIGNALS: Final = ("new_model", "new_network", "velocity", "burst", "probing", "failures")

#: A caller without the key raises these, or a caller with it by requests that are refused anyway.
_NEVER_SUSPENDS: Final = ("probing", "failures")


def _known_signals(value: list[str]) -> str | None:
    unknown = [signal for signal in value if signal not in SIGNALS]
    return f"unknown signal {unknown[0]!r}; known are {', '.join(SIGNALS)}" if unknown else None


@dataclass(frozen=True, slots=True)
class AnomalySettings:
    """Which signals are watched, and which of them suspend a key. Without a URL no webhook is sent."""

    watch: list[str] = setting([], _known_signals)
    suspend: list[str] = setting([], _known_signals)
    #: Networks that are learned per key.
    networks_max: int = setting(32, within(1, 10_000))
    suspensions_per_hour_max: int = setting(20, within(0, 100_000))
    webhook_url: str = setting("", value_checks.webhook_url)
    webhook_secret: str = setting("", value_checks.webhook_secret, secret=True)


def conflicts(anomalies: AnomalySettings) -> list[str]:
    """The contradictions between keys of the table that are valid individually."""
    wrong = [
        f"anomalies.suspend: {signal!r} must not suspend: clients other than the key's own can raise it"
        for signal in anomalies.suspend
        if signal in _NEVER_SUSPENDS
    ]
    unwatched = [signal for signal in anomalies.suspend if signal not in anomalies.watch]
    if unwatched:
        wrong.append(f"anomalies.suspend: {unwatched[0]!r} must also be in anomalies.watch")
    return wrong
