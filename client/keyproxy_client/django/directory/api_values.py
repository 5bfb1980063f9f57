"""Values of the admin API's JSON: times, lifetimes, keys."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from keyproxy_client.django.directory.interface import DirectoryKey, IssuedKey

#: For times that Python cannot represent: infinite ones, and those of years that have more than four digits.
_LAST: Final = datetime.max.replace(tzinfo=UTC)
_FIRST: Final = datetime.min.replace(tzinfo=UTC)


def moment(text: str | None) -> datetime | None:
    """A time of the API; one beyond the calendar becomes the calendar's last or first."""
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return _FIRST if text.startswith("-") else _LAST


def lifetime(life: timedelta | None) -> int | None:
    """A lifetime as `expires_in_seconds`."""
    return None if life is None else max(1, int(life.total_seconds()))


def issued_key(content: dict[str, Any]) -> IssuedKey:
    """A key of a response that has its secret."""
    return IssuedKey(
        content["id"],
        content["user"],
        content["is_test"],
        moment(content["expires_at"]),
        content["secret"],
        tuple(content["scopes"]),
        moment(content.get("old_expires_at")),
    )


def key(content: dict[str, Any]) -> DirectoryKey:
    """A key of a response."""
    return DirectoryKey(
        id=content["id"],
        user=content["user"],
        hint=content["hint"],
        name=content["name"],
        scopes=tuple(content["scopes"]),
        is_test=content["is_test"],
        created_at=moment(content["created_at"]) or _FIRST,
        expires_at=moment(content["expires_at"]),
        revoked_at=moment(content["revoked_at"]),
        revoke_reason=content["revoke_reason"],
        replaces=content["replaces"],
        last_used_at=moment(content["last_used_at"]),
    )
