"""Who may see and change keys: `view_key`, `issue_key`, `rotate_key` and `revoke_key` of the application `keyproxy`."""

from __future__ import annotations

from django.http import HttpRequest


def may(request: HttpRequest, action: str) -> bool:
    """Whether the staff member has the permission for an action."""
    return bool(request.user.has_perm(f"keyproxy.{action}_key"))
