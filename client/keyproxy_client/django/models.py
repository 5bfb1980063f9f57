"""The tables of this package in Django's database: events for keyproxy, and credentials of users, sealed."""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.db import models
from django.utils import timezone


class Operation(models.TextChoices):
    """What an event does to a user in keyproxy."""

    CREATE = "create"
    DISABLE = "disable"
    ENABLE = "enable"
    DELETE = "delete"


class OutboxEvent(models.Model):
    """A change of a user that keyproxy has not confirmed yet, written in the transaction of the change.

    The events of one user are delivered in the order of their ids. `attempts` counts the claims of the event, and so
    distinguishes the claim of one process from a later one.
    """

    operation = models.CharField(max_length=8, choices=Operation.choices)
    user_id = models.CharField(max_length=128)
    payload = models.JSONField(default=dict)
    attempts = models.PositiveIntegerField(default=0)
    next_at = models.DateTimeField(default=timezone.now)
    last_error = models.TextField(default="", blank=True)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        db_table = "keyproxy_outbox"
        verbose_name = "outbox event"
        default_permissions = ("view",)
        indexes: ClassVar = [
            models.Index(fields=["user_id", "id"], name="keyproxy_outbox_user"),
            models.Index(fields=["next_at"], name="keyproxy_outbox_next_at"),
        ]

    def __str__(self) -> str:
        return f"{self.operation} {self.user_id}"


class Credential(models.Model):
    """The key with which background work calls keyproxy as one user. `sealed` holds its secret, encrypted.

    A user has at most one credential per mode that is not retired.
    """

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    key_id = models.CharField(max_length=128, unique=True)
    is_test = models.BooleanField(default=False)
    sealed = models.BinaryField()
    issued_at = models.DateTimeField(default=timezone.now)
    expires_at = models.DateTimeField(null=True, blank=True)
    retired_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "keyproxy_credential"
        default_permissions = ()
        permissions: ClassVar = [
            ("view_key", "Can view API keys"),
            ("issue_key", "Can issue API keys"),
            ("rotate_key", "Can rotate API keys"),
            ("revoke_key", "Can revoke API keys"),
        ]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["user", "is_test"],
                condition=models.Q(retired_at__isnull=True),
                name="keyproxy_credential_current",
            )
        ]

    def __str__(self) -> str:
        return self.key_id
