"""The Django application."""

from __future__ import annotations

from django.apps import AppConfig, apps
from django.core.exceptions import ImproperlyConfigured


class KeyproxyConfig(AppConfig):
    """`INSTALLED_APPS += ["keyproxy_client.django"]`."""

    name = "keyproxy_client.django"
    label = "keyproxy"
    verbose_name = "keyproxy"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect this package to Django; stop a process whose settings have errors E001 or E002.

        Servers do not run system checks: a warning there would come too late.
        """
        from keyproxy_client import acting
        from keyproxy_client.django import checks
        from keyproxy_client.django.incoming import request_user
        from keyproxy_client.django.provisioning import receivers

        errors = checks.start_errors()
        if errors:
            raise ImproperlyConfigured("\n".join(str(error) for error in errors))
        acting.convert_users_by(request_user.acting_user)
        receivers.connect()
        if apps.is_installed("django.contrib.admin"):
            _add_keys_to_the_admin()


def _add_keys_to_the_admin() -> None:
    """Add keys to a user admin that was registered after the `admin` module of this package was imported."""
    from django.contrib import admin
    from django.contrib.auth import get_user_model

    # If it is not registered yet, autodiscovery imports the module later: not before, as that is once.
    if admin.site.is_registered(get_user_model()):
        from keyproxy_client.django.admin import attach

        attach()
