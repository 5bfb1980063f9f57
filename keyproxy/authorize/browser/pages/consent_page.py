"""The page where a user allows or denies a program."""

from __future__ import annotations

import html
from typing import NamedTuple

from aiohttp import web

from keyproxy.authorize.browser.authorization_request import AuthorizationRequest
from keyproxy.authorize.browser.pages import display, layout
from keyproxy.authorize.browser.pages.display import escaped, isolated
from keyproxy.authorize.browser.pages.page_texts import text
from keyproxy.oauth import redirect_uris
from keyproxy.oauth.client import Client, ClientKind


class ConsentForm(NamedTuple):
    """What the page shows. `scopes`: those that the program gets. `ticket`: of the decision."""

    ticket: str
    client: Client
    user_id: str
    scopes: tuple[str, ...]
    request: AuthorizationRequest


def consent_page(form: ConsentForm, language: str) -> web.Response:
    """The page with the form."""
    request, target = form.request, form.request.redirect_uri
    name = display.visible(form.client.name) or text("unnamed", language)
    is_known = form.client.kind is ClientKind.LISTED
    notes = "" if is_known else f'<p class="note">{text("not_verified", language)}</p>\n'
    is_on_device = display.is_on_device(target)
    loopback = f'<p class="note">{text("loopback", language)}</p>\n' if is_on_device else ""
    mode = f" ({text('test_traffic', language)})" if request.is_test else ""
    scopes = "".join(f"<li>{escaped(scope)}</li>" for scope in form.scopes)
    granted = f"<ul>{scopes}</ul>" if scopes else text("no_scopes", language)
    another = html.escape(request.query(language))
    body = (
        f"{notes}"
        f'<p class="soft">{text("destination", language)}</p>\n'
        f'<p class="host">{isolated(redirect_uris.shown_target(target))}</p>\n{loopback}'
        f"<dl><dt>{text('user', language)}</dt><dd>{isolated(form.user_id)}</dd>\n"
        f"<dt>{text('resource', language)}</dt><dd>{isolated(request.resource)}{mode}</dd>\n"
        f"<dt>{text('scopes', language)}</dt><dd>{granted}</dd></dl>\n"
        f'<form method="post" action="/oauth/consent">{layout.hidden("ticket", form.ticket)}\n'
        f'<div class="choices"><button name="decision" value="allow">{text("allow", language)}</button>\n'
        f'<button name="decision" value="deny">{text("deny", language)}</button></div></form>\n'
        f'<p><a href="/oauth/authorize?{another}">{text("other_account", language)}</a></p>'
    )
    return layout.page(language, text("consent_title", language, client=name), body)
