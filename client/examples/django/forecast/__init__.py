"""An example: a site with an API, whose background jobs call the API. See docs/django.md of keyproxy."""

from forecast.celery import app

__all__ = ["app"]
