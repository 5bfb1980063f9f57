"""What a browser sends: queries and forms, read strictly, and the language of the pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from aiohttp import web

from keyproxy.authorize import form
from keyproxy.authorize.browser.cookies import check_form_origin
from keyproxy.authorize.browser.pages.languages import language_of
from keyproxy.authorize.endpoint import PageError
from keyproxy.oauth.oauth_error import OAuthError

#: The language of a login in progress, once its ticket is open.
LANGUAGE: Final = web.RequestKey("language", str)


def query_of(request: web.Request) -> Mapping[str, str]:
    """The parameters of an authorization request. Raises PageError 400."""
    try:
        return form.query_of(request)
    except OAuthError as error:
        raise PageError(400, "parameters_invalid", detail=error.description) from error


async def form_of(request: web.Request) -> Mapping[str, str]:
    """The fields of a form that a page of this server sent. Raises PageError 400, 403."""
    check_form_origin(request)
    try:
        return await form.form_of(request)
    except OAuthError as error:
        raise PageError(400, "form_invalid", detail=error.description) from error


def language_of_login(request: web.Request, fallback: str) -> str:
    """The language of the login in progress, else the one that the browser prefers. `fallback`: `oauth.language`."""
    return request.get(LANGUAGE) or language_of(request, fallback)
