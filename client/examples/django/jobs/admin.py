"""The old API keys in Django's admin."""

from django.contrib import admin
from rest_framework_api_key.admin import APIKeyModelAdmin

from jobs.models import CustomAPIKey

admin.site.register(CustomAPIKey, APIKeyModelAdmin)
