"""An exception handler of DRF with a form of its own."""

from __future__ import annotations

from typing import Any

from rest_framework.response import Response
from rest_framework.views import exception_handler


def wrapped(error: Exception, context: Any) -> Response | None:
    """Every error under one member."""
    response = exception_handler(error, context)
    if response is not None:
        response.data = {"error": response.data}
    return response
