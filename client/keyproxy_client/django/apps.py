"""The Django application."""

from __future__ import annotations

from django.apps import AppConfig


class KeyproxyConfig(AppConfig):
    """`INSTALLED_APPS += ["keyproxy_client.django"]`."""

    name = "keyproxy_client.django"
    label = "keyproxy"
    verbose_name = "keyproxy"
    default_auto_field = "django.db.models.BigAutoField"
