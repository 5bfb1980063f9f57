"""Celery imports the modules called `tasks` of all installed applications."""

from __future__ import annotations

import importlib

import django
import pytest


def count() -> None:
    """A task."""


def test_tasks_of_the_client_can_be_imported_with_every_django() -> None:
    module = importlib.import_module("keyproxy_client.django.tasks")
    if django.VERSION >= (6, 0):
        assert module.task(count).name == "count"
    else:
        with pytest.raises(ImportError, match=r"needs Django 6\.0"):
            module.task(count)
