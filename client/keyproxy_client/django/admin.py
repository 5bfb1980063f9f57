"""Adds keys to the admin of the user model. Django's autodiscovery imports this module.

The project registers the user model, in whichever application. Applications that come later in INSTALLED_APPS are not
imported yet, so `attach` also runs when all applications are ready.
"""

from __future__ import annotations

from django.contrib import admin
from django.contrib.admin import AdminSite
from django.contrib.auth import get_user_model

from keyproxy_client.django.key_admin.user_page import KeyAdminMixin

__all__ = ["KeyAdminMixin", "attach"]


def attach(site: AdminSite = admin.site) -> bool:
    """Add keys to the registered admin of the user model, once, and return whether there is one."""
    user_model = get_user_model()
    if not site.is_registered(user_model):
        return False
    registered = type(site.get_model_admin(user_model))
    if not issubclass(registered, KeyAdminMixin):
        site.unregister(user_model)
        site.register(user_model, type(registered.__name__, (KeyAdminMixin, registered), {}))
    return True


attach()
