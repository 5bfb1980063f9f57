"""Settings of the test project. The database is the row's PostgreSQL, as the role `app`; without one, SQLite.

Tests change settings by `project.testing.keyproxy_settings` or `django.test.override_settings`.
"""

from __future__ import annotations

import json
import os
import secrets
from typing import Any

from deployment import Deployment

_deployment = Deployment.named()


def _database(dsn: str) -> dict[str, Any]:
    from psycopg.conninfo import conninfo_to_dict

    parts = conninfo_to_dict(dsn)
    names = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
    return {
        "ENGINE": "django.db.backends.postgresql",
        "ATOMIC_REQUESTS": True,
        **{names[part]: value for part, value in parts.items() if part in names and value is not None},
    }


# A test that starts a server of this project passes settings in the environment.
SECRET_KEY = os.environ.get("TEST_SECRET_KEY") or secrets.token_urlsafe(40)
DEBUG = False
ALLOWED_HOSTS = ["*"]
USE_TZ = True
ROOT_URLCONF = "project.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES: dict[str, dict[str, Any]] = {
    "default": (
        _database(_deployment.app_dsn) if _deployment else {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    )
}
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "rest_framework",
    "rest_framework_api_key",
    "keyproxy_client.django",
    "project.accounts",
]
# The tables of others are made in one step: their migrations would take most of the time of a row.
MIGRATION_MODULES = dict.fromkeys(
    ["admin", "auth", "contenttypes", "sessions", "rest_framework_api_key", "accounts"], None
)
MIDDLEWARE = [
    "keyproxy_client.django.middleware.KeyproxyMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
# From Django 6.0
TASKS = {
    "default": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
    "stored": {"BACKEND": "django.tasks.backends.dummy.DummyBackend"},
    "own": {"BACKEND": "project.background.OwnBackend"},
}
KEYPROXY: dict[str, Any] = {
    "BACKEND": "off",
    "TENANT": "acme",
    "TRUST": "loopback",
}
if _deployment:
    KEYPROXY |= {
        "ORIGIN": _deployment.origin,
        "JWKS_URL": _deployment.jwks_url,
        "SERVICE_KEY_FILE": _deployment.service_key_pattern,
        "SERVICE_TEST_KEY_FILE": _deployment.service_test_key_pattern,
    }
KEYPROXY |= json.loads(os.environ.get("TEST_KEYPROXY", "{}"))
