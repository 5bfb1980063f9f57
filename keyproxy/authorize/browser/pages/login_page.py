"""The page where a user enters an API key."""

from __future__ import annotations

from typing import NamedTuple

from aiohttp import web

from keyproxy.authorize.browser.pages import layout
from keyproxy.authorize.browser.pages.display import isolated
from keyproxy.authorize.browser.pages.page_texts import text
from keyproxy.oauth import redirect_uris


class LoginForm(NamedTuple):
    """What the page shows. `client`: the name of the program that wants to connect; None: the user page follows.

    `redirect_uri`: that of the program. `problem`: why the last attempt has failed, as HTML; empty before the first one.
    """

    ticket: str
    issuer: str
    resource: str
    client: str | None
    redirect_uri: str = ""
    problem: str = ""


def login_page(form: LoginForm, language: str, *, status: int = 200) -> web.Response:
    """The page with the form."""
    resource = isolated(form.resource)
    if form.client is None:
        intent = text("login_for_user_page", language, resource=resource)
    else:
        name = f"<strong>{isolated(form.client or text('unnamed', language))}</strong>"
        host = isolated(redirect_uris.shown_target(form.redirect_uri))
        intent = text("login_for_client", language, client=name, host=host, resource=resource)
    failed = layout.alert(form.problem).replace("<p ", '<p id="problem" ') if form.problem else ""
    attributes = 'aria-describedby="hint"'
    if form.problem:
        # The focus makes screen readers read the problem with the field.
        attributes = 'aria-invalid="true" aria-describedby="problem hint" autofocus'
    body = (
        f"<p>{intent}</p>\n{failed}\n"
        f'<form method="post" action="/oauth/login">{layout.hidden("ticket", form.ticket)}\n'
        f'<label for="key">{text("key_label", language)}</label>\n'
        f'<input id="key" name="key" type="password" required autocomplete="current-password" spellcheck="false"'
        f' autocapitalize="none" {attributes}>\n'
        f'<p class="soft" id="hint">{text("key_hint", language, issuer=isolated(form.issuer))}</p>\n'
        f"<button>{text('login_button', language)}</button></form>"
    )
    return layout.page(language, text("login_title", language), body, status=status)
