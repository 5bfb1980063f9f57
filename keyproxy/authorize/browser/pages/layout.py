"""The frame of every page: head, style, and the headers that confine it."""

from __future__ import annotations

import base64
import hashlib
import html
from typing import Final

from aiohttp import web

#: The contrast is 4.5 or more for text and 3 for borders of controls, in both schemes (WCAG 2.2, 1.4.3 and 1.4.11).
_STYLE: Final = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #fff; --text: #1b1f24; --soft: #4d5560; --line: #d5d9df;
  --edge: #767d88; --link: #0b57d0; --alert: #a3141f; --note: #fff6dc; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1e2126; --text: #eceef1; --soft: #b1b8c2;
  --line: #3a3f47; --edge: #868e9a; --link: #8ab4f8; --alert: #ffb3b8; --note: #3a3212; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 34rem; margin: 2rem auto; padding: 1.5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; overflow-wrap: anywhere; } :lang(ko) { word-break: keep-all; }
h1 { font-size: 1.4rem; line-height: 1.3; margin: 0 0 1rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
ul { padding-inline-start: 1.25rem; } dl { margin: 1rem 0; } dt { color: var(--soft); } dd { margin: 0 0 .75rem; }
a { color: var(--link); } .soft { color: var(--soft); } .host { font-size: 1.5rem; line-height: 1.3; font-weight: 600; }
.soft:has(+ .host) { margin-bottom: 0; } .host { margin: 0 0 1rem; } main > :last-child { margin-bottom: 0; }
.note, .alert { padding: .75rem; border-radius: .375rem; border: 1px solid var(--edge); }
.note { background: var(--note); } .alert { color: var(--alert); border-color: var(--alert); }
label { display: block; font-weight: 600; margin-bottom: .25rem; }
input { width: 100%; min-height: 2.75rem; padding: .5rem; font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--edge); border-radius: .375rem; }
[aria-invalid] { border: 2px solid var(--alert); }
button { min-height: 2.75rem; padding: .5rem 1rem; font: inherit; font-weight: 600; color: var(--text);
  background: var(--card); border: 2px solid var(--edge); border-radius: .375rem; cursor: pointer; }
button:hover { border-color: var(--text); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.choices { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin-top: 1.5rem; }
.choices + p { margin-top: 1rem; } section { border-top: 1px solid var(--line); margin-top: 1rem; padding-top: .25rem; }
section > form { margin: 1rem 0; } li form { margin: .5rem 0 1rem; }
"""

_DIGEST: Final = base64.b64encode(hashlib.sha256(_STYLE.encode("utf-8")).digest()).decode("ascii")

#: There is no `form-action`: browsers apply it to the redirect after a form too, and consent redirects to the client.
HEADERS: Final = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


def page(language: str, title: str, body: str, *, status: int = 200) -> web.Response:
    """A page. `title`: its text, which is the heading too. `body`: the HTML after the heading."""
    name = html.escape(title)
    text = (
        f'<!doctype html>\n<html lang="{language}">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{name}</h1>\n{body}\n</main></body>\n</html>\n"
    )
    return web.Response(status=status, text=text, content_type="text/html", charset="utf-8", headers=HEADERS)


def alert(text: str) -> str:
    """An error, which screen readers announce. `text`: HTML."""
    return f'<p class="alert" role="alert">{text}</p>'


def hidden(name: str, value: str) -> str:
    """A form field that is not shown."""
    return f'<input type="hidden" name="{name}" value="{html.escape(value, quote=True)}">'
