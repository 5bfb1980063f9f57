"""The list of a user's keys on its page: read from keyproxy, not from a table of Django."""

from __future__ import annotations

from typing import Any

from django.contrib.admin.options import InlineModelAdmin
from django.forms import BaseFormSet, Form
from django.http import HttpRequest
from django.utils import timezone

from keyproxy_client.django.directory.errors import DirectoryError
from keyproxy_client.django.directory.interface import DirectoryKey
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.key_admin.permissions import may
from keyproxy_client.django.models import Credential
from keyproxy_client.django.users import InvalidId, keyproxy_id, tenant_of


class KeysFormSet(BaseFormSet):  # type: ignore[type-arg]
    """A formset without forms, which the user page requires of an inline: it is always valid and saves nothing."""

    form = Form
    extra = min_num = 0
    max_num = absolute_max = 0
    can_order = can_delete = can_delete_extra = validate_max = validate_min = edit_only = False
    renderer = None

    def __init__(self, *_args: Any, instance: Any = None, prefix: str = "keyproxy_keys", **_kwargs: Any) -> None:
        super().__init__(prefix=prefix)
        self.instance = instance
        self.new_objects: list[object] = []
        self.changed_objects: list[object] = []
        self.deleted_objects: list[object] = []

    @classmethod
    def get_default_prefix(cls) -> str:
        """A prefix of its own."""
        return "keyproxy_keys"

    def is_valid(self) -> bool:
        """There is nothing to validate."""
        return True

    def has_changed(self) -> bool:
        """Nor to change."""
        return False

    def get_queryset(self) -> list[object]:
        """Nor to edit."""
        return []

    def save(self, commit: bool = True) -> list[object]:
        """Nor to save."""
        return []


class KeysInline(InlineModelAdmin):  # type: ignore[type-arg]
    """The keys of a user and links to the actions, as the permissions of the staff member allow."""

    model = Credential
    template = "keyproxy/admin/keys_inline.html"
    verbose_name_plural = "API keys"
    extra = max_num = 0
    can_delete = False
    #: Django's checks require a foreign key to the page's model; these rows are in no table of Django.
    checks_class = type("NoChecks", (), {"check": lambda self, inline, **kwargs: []})

    def get_formset(self, request: HttpRequest, obj: Any = None, **_kwargs: Any) -> Any:
        """A formset that carries the keys of the user to the template."""
        return type("KeysOfUser", (KeysFormSet,), {"shown": shown_keys(request, obj)})

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        """None: the template shows the keys."""
        return []

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Whether any part of the list is visible."""
        return any(may(request, action) for action in ("view", "issue", "rotate", "revoke"))

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Keys are issued by the action."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Keys are not edited."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Keys are revoked by the action."""
        return False


def keys_of(user: Any) -> list[DirectoryKey]:
    """The keys of a user of Django in keyproxy. Raises DirectoryError or InvalidId."""
    return directory().keys.of_user(keyproxy_id(user), tenant_of(user))


def shown_keys(request: HttpRequest, user: Any) -> dict[str, Any]:
    """What the template shows of a user's keys."""
    shown: dict[str, Any] = {
        "keys": [],
        "problem": "",
        "user_pk": user.pk,
        **{f"may_{action}": may(request, action) for action in ("view", "issue", "rotate", "revoke")},
    }
    if not shown["may_view"]:
        return shown
    try:
        found = keys_of(user)
    except (DirectoryError, InvalidId) as error:
        # The page of the user works without keyproxy.
        return {**shown, "problem": str(error)}
    now = timezone.now()
    shown["keys"] = [{"key": key, "state": state_of(key, found, now), "works": key.works_at(now)} for key in found]
    return shown


def state_of(key: DirectoryKey, others: list[DirectoryKey], now: Any) -> str:
    """The state of a key, in keyproxy's words."""
    if key.revoked_at is not None:
        return "revoked"
    if not key.works_at(now):
        return "expired"
    return "retiring" if any(other.replaces == key.id and other.works_at(now) for other in others) else "active"
