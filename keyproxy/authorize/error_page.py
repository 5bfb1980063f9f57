"""The page of an error."""

from __future__ import annotations

import html

from aiohttp import web

from keyproxy.authorize.endpoint import PageError


def error_page(_request: web.Request, error: PageError) -> web.Response:
    """Build the page of an error."""
    text = html.escape(error.message)
    page = f'<!doctype html><html lang="en"><title>{text}</title><p role="alert">{text}</p></html>'
    return web.Response(status=error.status, text=page, content_type="text/html", headers=error.headers)
