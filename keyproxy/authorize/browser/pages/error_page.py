"""The page of a request that failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from aiohttp import web

from keyproxy.authorize.browser.pages import layout
from keyproxy.authorize.browser.pages.display import isolated
from keyproxy.authorize.browser.pages.error_texts import ERRORS, TITLE
from keyproxy.authorize.endpoint import PageError

_RETRY_AFTER: Final = "Retry-After"
_SECONDS: Final = "seconds"
_SERVER_ERRORS: Final = 500


def error_page(error: PageError, language: str) -> web.Response:
    """The page of an error. With a value `seconds`, the response has Retry-After."""
    body = layout.alert(error_text(error.message, language, error.values, status=error.status))
    response = layout.page(language, TITLE[language], body, status=error.status)
    if _SECONDS in error.values:
        response.headers[_RETRY_AFTER] = error.values[_SECONDS]
    return response


def error_text(message: str, language: str, values: Mapping[str, str], *, status: int) -> str:
    """The text of an error as HTML. A name without a text has a general one."""
    texts = ERRORS.get(message) or ERRORS["internal_error" if status >= _SERVER_ERRORS else "request_malformed"]
    return texts[language].format_map({name: isolated(value) for name, value in values.items()})
