"""The page with the programs that a user has connected, and their devices."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from aiohttp import web

from keyproxy.authorize.browser.pages import display, layout
from keyproxy.authorize.browser.pages.display import escaped, isolated
from keyproxy.authorize.browser.pages.page_texts import text
from keyproxy.store.oauth.authorizations import CONNECTIONS_MAX
from keyproxy.store.postgres.database import Row
from keyproxy.store.postgres.times import Instant, time_text


class ConnectionsView(NamedTuple):
    """What the page shows. `rows`: those of `Authorizations.connections`. `has_ended`: the user has just ended some."""

    ticket: str
    user_id: str
    rows: Sequence[Row]
    has_ended: bool = False


def connections_page(view: ConnectionsView, language: str) -> web.Response:
    """The page, with a form for each program and device."""
    shown = view.rows[:CONNECTIONS_MAX]
    parts = [f'<p class="soft">{text("user", language)} {isolated(view.user_id)}</p>']
    if view.has_ended:
        parts.append(f'<p class="note" role="status">{text("ended", language)}</p>')
    for _, rows in itertools.groupby(shown, key=lambda row: row["grant_id"]):
        parts.append(_program(list(rows), view.ticket, language))
    if not shown:
        parts.append(f"<p>{text('no_connections', language)}</p>")
    if len(view.rows) > len(shown):
        parts.append(f"<p>{text('more_connections', language)}</p>")
    if shown:
        parts.append(f"<section>{_form(view.ticket, 'all', text('end_all', language))}</section>")
    return layout.page(language, text("connections_title", language), "\n".join(parts))


def _program(rows: Sequence[Row], ticket: str, language: str) -> str:
    first = rows[0]
    name = isolated(first["name"]) if display.visible(first["name"]) else text("unnamed", language)
    scopes = " ".join(first["scopes"])
    mode = f" ({text('test_traffic', language)})" if first["is_test"] else ""
    devices = "".join(_device(row, ticket, language) for row in rows if row["session_id"] is not None)
    listed = f"<ul>{devices}</ul>" if devices else f"<p>{text('no_devices', language)}</p>"
    end = _form(ticket, f"grant:{first['grant_id']}", text("end_program", language, client=name))
    return (
        f"<section><h2>{name}</h2>\n"
        f'<p class="soft">{isolated(first["resource"])}{mode}<br>{escaped(scopes)}</p>\n{listed}\n{end}</section>'
    )


def _device(row: Row, ticket: str, language: str) -> str:
    created = text("device", language, time=_time(row["created_at"]))
    last = row["last_token_at"]
    token = text("no_token", language) if last is None else text("last_token", language, time=_time(last))
    form = _form(ticket, f"session:{row['session_id']}", text("end_device", language))
    return f"<li>{created}<br>{token}\n{form}</li>"


def _time(moment: Instant) -> str:
    exact = html.escape(time_text(moment) or "")
    # To the minute, in a form that all languages read.
    shown = exact[:16].replace("T", " ") + " UTC" if isinstance(moment, datetime) else exact
    return f'<time datetime="{exact}">{shown}</time>'


def _form(ticket: str, end: str, label: str) -> str:
    return (
        f'<form method="post" action="/oauth/connections/end">{layout.hidden("ticket", ticket)}'
        f'<button name="end" value="{html.escape(end)}">{label}</button></form>'
    )
