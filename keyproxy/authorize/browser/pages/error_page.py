"""The page of a request that failed."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from keyproxy.authorize.browser.pages import layout
from keyproxy.authorize.browser.pages.display import isolated
from keyproxy.authorize.browser.pages.error_texts import ERRORS, TITLE
from keyproxy.authorize.endpoint import PageError

#: Values of an error that are header fields too.
_RETRY_AFTER: Final = "seconds"


def error_page(error: PageError, language: str) -> web.Response:
    """The page of an error. With a value `seconds`, the response has Retry-After."""
    response = layout.page(language, TITLE[language], layout.alert(error_text(error, language)), status=error.status)
    if _RETRY_AFTER in error.values:
        response.headers["Retry-After"] = error.values[_RETRY_AFTER]
    return response


def error_text(error: PageError, language: str) -> str:
    """The text of an error, as HTML."""
    values = {name: isolated(value) for name, value in error.values.items()}
    return ERRORS[error.message][language].format_map(values)
