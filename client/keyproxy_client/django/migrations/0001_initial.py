"""The outbox of events for keyproxy, and the sealed credentials of users."""

from typing import ClassVar

import django.db.models.deletion
import django.utils.timezone
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies: ClassVar = [
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations: ClassVar = [
        migrations.CreateModel(
            name="OutboxEvent",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                (
                    "operation",
                    models.CharField(
                        choices=[
                            ("create", "Create"),
                            ("disable", "Disable"),
                            ("enable", "Enable"),
                            ("delete", "Delete"),
                        ],
                        max_length=8,
                    ),
                ),
                ("user_id", models.CharField(max_length=128)),
                ("payload", models.JSONField(default=dict)),
                ("attempts", models.PositiveIntegerField(default=0)),
                ("next_at", models.DateTimeField(default=django.utils.timezone.now)),
                ("last_error", models.TextField(blank=True, default="")),
                ("created_at", models.DateTimeField(default=django.utils.timezone.now)),
            ],
            options={
                "verbose_name": "outbox event",
                "db_table": "keyproxy_outbox",
                "default_permissions": ("view",),
                "indexes": [
                    models.Index(fields=["user_id", "id"], name="keyproxy_outbox_user"),
                    models.Index(fields=["next_at"], name="keyproxy_outbox_next_at"),
                ],
            },
        ),
        migrations.CreateModel(
            name="Credential",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("key_id", models.CharField(max_length=128, unique=True)),
                ("is_test", models.BooleanField(default=False)),
                ("sealed", models.BinaryField()),
                ("issued_at", models.DateTimeField(default=django.utils.timezone.now)),
                ("expires_at", models.DateTimeField(blank=True, null=True)),
                ("retired_at", models.DateTimeField(blank=True, null=True)),
                (
                    "user",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, related_name="+", to=settings.AUTH_USER_MODEL
                    ),
                ),
            ],
            options={
                "db_table": "keyproxy_credential",
                "permissions": [
                    ("view_key", "Can view API keys"),
                    ("issue_key", "Can issue API keys"),
                    ("rotate_key", "Can rotate API keys"),
                    ("revoke_key", "Can revoke API keys"),
                ],
                "default_permissions": (),
                "constraints": [
                    models.UniqueConstraint(
                        condition=models.Q(("retired_at__isnull", True)),
                        fields=("user", "is_test"),
                        name="keyproxy_credential_current",
                    )
                ],
            },
        ),
    ]
