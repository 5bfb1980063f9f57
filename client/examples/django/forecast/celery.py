"""The Celery application."""

import os

import keyproxy_client.celery
from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "forecast.settings")

app = Celery("forecast")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
keyproxy_client.celery.install(app)
