"""API keys that belong to users, and the jobs that users start."""

from django.conf import settings
from django.db import models
from rest_framework_api_key.models import AbstractAPIKey


class CustomAPIKey(AbstractAPIKey):
    """An API key of a user; a test key is for trying things out."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_keys")
    is_test = models.BooleanField(default=False)


class Job(models.Model):
    """What a user wants computed, and what came of it."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="jobs")
    prompt = models.CharField(max_length=200)
    is_test = models.BooleanField(default=False)
    result = models.JSONField(null=True)
