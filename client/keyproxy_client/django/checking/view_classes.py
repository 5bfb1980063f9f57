"""Where a project uses the DRF classes of this package: they need a trust rule even without the middleware."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.urls import get_resolver

_MODULE: Final = "keyproxy_client.django.drf"
_DEFAULTS: Final = ("DEFAULT_AUTHENTICATION_CLASSES", "DEFAULT_PERMISSION_CLASSES", "DEFAULT_THROTTLE_CLASSES")
_OF_VIEWS: Final = ("authentication_classes", "permission_classes", "throttle_classes")


def is_drf_class_in_settings() -> bool:
    """Whether REST_FRAMEWORK makes one of the classes a default. Imports nothing."""
    values = getattr(django_settings, "REST_FRAMEWORK", None) or {}
    return any(_is_ours(one) for key in _DEFAULTS for one in values.get(key) or ())


def is_drf_class_in_views() -> bool:
    """Whether a view of the URLconf uses one of the classes. Imports the URLconf."""
    if not getattr(django_settings, "ROOT_URLCONF", None):
        return False
    try:
        patterns = get_resolver().url_patterns
    except (ImproperlyConfigured, ImportError):
        return False  # Django's own check of URLs reports it
    return any(
        _is_ours(one) for view in _views(patterns) for name in _OF_VIEWS for one in getattr(view, name, None) or ()
    )


def _views(patterns: Iterable[Any]) -> Iterator[Any]:
    for pattern in patterns:
        if hasattr(pattern, "url_patterns"):
            yield from _views(pattern.url_patterns)
            continue
        callback = getattr(pattern, "callback", None)
        yield getattr(callback, "cls", None) or getattr(callback, "view_class", None)


def _is_ours(one: Any) -> bool:
    """Also for a subclass, an instance, a dotted path, and operands of `|`, `&` and `~`."""
    if isinstance(one, str):
        return one.startswith(f"{_MODULE}.")
    operands = [getattr(one, name) for name in ("op1_class", "op2_class") if hasattr(one, name)]
    if operands:
        return any(_is_ours(operand) for operand in operands)
    kind = one if isinstance(one, type) else type(one)
    return any(base.__module__ == _MODULE for base in kind.__mro__)
