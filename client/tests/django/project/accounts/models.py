"""The keys of a project before it used keyproxy: of a user, live or test."""

from __future__ import annotations

from django.conf import settings
from django.contrib.auth.models import User
from django.db import models
from rest_framework_api_key.models import AbstractAPIKey


class CustomAPIKey(AbstractAPIKey):
    """A key of djangorestframework-api-key with an owner and a mode."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_keys")
    is_test = models.BooleanField(default=False)

    class Meta(AbstractAPIKey.Meta):
        verbose_name = "API key of a user"


class Member(User):
    """The user model under another name."""

    class Meta:
        proxy = True


class Customer(User):
    """A user with a table of its own."""

    company = models.CharField(max_length=40)
