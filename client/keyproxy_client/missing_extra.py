"""The error for a library that an integration needs and that is not installed."""

from __future__ import annotations


def missing_extra(extra: str, cause: ImportError, *others: str) -> ImportError:
    """An ImportError that names the extra to install, to be raised from its cause. `others` contain the library too."""
    choice = " or ".join(f"'keyproxy-client[{one}]'" for one in (extra, *others))
    return ImportError(f"{cause.name or cause} is not installed: pip install {choice}", name=cause.name)
