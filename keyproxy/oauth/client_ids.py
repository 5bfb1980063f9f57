"""Ids of clients that encode their own metadata, so that registration stores nothing: `kpc1_` and base64url.

The content is canonical JSON, RFC 8785: the sorted redirect URIs without the ports of loopback, and the name. One program
has one id, and an id that would not be encoded to the same bytes is no id.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Iterable
from typing import Any, Final

from keyproxy.oauth import redirect_uris
from keyproxy.oauth.client import CLIENT_ID_BYTES_MAX, REDIRECT_URIS_MAX, Client, ClientKind
from keyproxy.oauth.names import clean_name, is_too_long

VALUE_PREFIX: Final = "kpc1_"
DOCUMENT_PREFIX: Final = "https:"
LISTED_PREFIX: Final = "listed:"

_PRESENTABLE: Final = re.compile(rf"[ -~]{{1,{CLIENT_ID_BYTES_MAX}}}")
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+")


def is_presentable(client_id: str) -> bool:
    """Whether a client id has only the characters of RFC 6749 appendix A.1, and not too many."""
    return _PRESENTABLE.fullmatch(client_id) is not None


def may_be_registered(client_id: str) -> bool:
    """Whether an operator may register this id: it is not one of those that describe themselves."""
    return is_presentable(client_id) and not client_id.startswith((VALUE_PREFIX, DOCUMENT_PREFIX, LISTED_PREFIX))


def encode_value_id(uris: Iterable[str], name: str) -> str:
    """The id of a program with these redirect URIs and this name. It may be longer than the bound of client ids."""
    content = {
        "name": clean_name(name),
        "redirect_uris": sorted({redirect_uris.without_loopback_port(u) for u in uris}),
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return VALUE_PREFIX + base64.urlsafe_b64encode(text.encode("utf-8")).rstrip(b"=").decode("ascii")


def decode_value_id(text: str, known_schemes: Collection[str] = ()) -> Client | None:
    """The client that an id describes, None if it is no valid id. `known_schemes`: see `redirect_uris.fault`."""
    if not text.startswith(VALUE_PREFIX) or len(text) > CLIENT_ID_BYTES_MAX:
        return None
    content = _decoded(text.removeprefix(VALUE_PREFIX))
    if not isinstance(content, dict) or content.keys() != {"name", "redirect_uris"}:
        return None
    name, uris = content["name"], content["redirect_uris"]
    if (
        not isinstance(name, str)
        or is_too_long(name)
        or not _are_texts(uris)
        or not 1 <= len(uris) <= REDIRECT_URIS_MAX
    ):
        return None
    if any(redirect_uris.fault(uri, known_schemes) for uri in uris) or encode_value_id(uris, name) != text:
        return None
    shown = name or redirect_uris.shown_target(uris[0])
    return Client(text, text, ClientKind.VALUE, shown, tuple(uris))


def _decoded(encoded: str) -> Any:
    if _BASE64URL.fullmatch(encoded) is None or len(encoded) % 4 == 1:
        return None
    try:
        return json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(one, str) for one in values)
