"""The contradictions between keys of the authorization server that are valid individually."""

from __future__ import annotations

from typing import Any


def contradictions(_settings: Any) -> list[str]:
    """Return a sentence for each fault of the `Settings`."""
    return []
