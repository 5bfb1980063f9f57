"""Ids and tenants in keyproxy as functions of a user, with and without an inverse."""

from __future__ import annotations

from typing import Any

from django.contrib.auth import get_user_model


def by_name(user: Any) -> str:
    """An id without a known inverse."""
    return f"n:{user.username}"


def by_name_with_inverse(user: Any) -> str:
    """An id with an inverse."""
    return f"n:{user.username}"


def _of_name(wanted: str) -> Any:
    return get_user_model().objects.filter(username=wanted.removeprefix("n:")).first()


by_name_with_inverse.user_of = _of_name  # type: ignore[attr-defined]


def tenant_by_mail(user: Any) -> str:
    """The tenant of a user by the domain of the e-mail address."""
    return str(user.email.partition("@")[2].partition(".")[0])
