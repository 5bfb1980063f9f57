"""The error for a library that an integration needs and that is not installed."""

from __future__ import annotations


def missing_extra(extra: str, cause: ImportError) -> ImportError:
    """An ImportError that names the extra to install, to be raised from its cause."""
    return ImportError(
        f"{cause.name or cause} is not installed: pip install 'keyproxy-client[{extra}]'", name=cause.name
    )
