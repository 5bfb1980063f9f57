"""Client ID Metadata Documents: the URLs that may be client ids, and the client that a document describes."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from keyproxy.oauth import redirect_uris
from keyproxy.oauth.client import CLIENT_ID_BYTES_MAX, REDIRECT_URIS_MAX, AuthMethod, Client, ClientKind
from keyproxy.oauth.client_refusals import DocumentRefused
from keyproxy.oauth.names import clean_name, is_too_long

_PORT: Final = 443
_PORT_MAX: Final = 65_535
_HOST_CHARACTERS_MAX: Final = 253

_URL: Final = re.compile(
    r"https://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/(?:[A-Za-z0-9\-._~:/@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+)"
    r"(?P<query>\?(?:[A-Za-z0-9\-._~:/?@!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)?"
)
_DOT_SEGMENT: Final = re.compile(r"/(?:\.|%2[Ee]){1,2}(?=/|$)")
#: Resolvers read a host that ends in a number, such as 0x7f.1, as an IPv4 address.
_ENDS_IN_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0[Xx][0-9A-Fa-f]*)")

#: The methods of the member `token_endpoint_auth_method` that are offered to clients without a registered secret.
_METHODS: Final = {"none": AuthMethod.NONE, "private_key_jwt": AuthMethod.PRIVATE_KEY_JWT}


@dataclass(frozen=True, slots=True)
class DocumentUrl:
    """The URL of a document. `is_literal`: its host is an IP address."""

    text: str
    host: str
    port: int
    is_literal: bool

    @property
    def is_plain(self) -> bool:
        """Whether it leads to a named host on the usual port, as everywhere but in the operator's own networks."""
        return not self.is_literal and self.port == _PORT


def document_url(text: str) -> DocumentUrl | None:
    """The URL of a document, None if the text is not one that may be fetched from anywhere."""
    parts = _URL.fullmatch(text)
    if parts is None or len(text) > CLIENT_ID_BYTES_MAX or _DOT_SEGMENT.search(parts["path"]):
        return None
    port = _PORT if parts["port"] is None else int(parts["port"])
    if not 1 <= port <= _PORT_MAX:
        return None
    host = parts["host"].lower().strip("[]")
    if len(host) > _HOST_CHARACTERS_MAX:
        return None
    return DocumentUrl(text, host, port, _is_address(host) or _ENDS_IN_NUMBER.fullmatch(host) is not None)


def client_of(url: str, content: bytes, schemes: frozenset[str]) -> Client:
    """The client that a document describes. `schemes`: see `redirect_uris.fault`. Raises DocumentRefused.

    Redirect URIs that are not acceptable are dropped: a program may list some for other servers.
    """
    metadata = json_object(content)
    if metadata.get("client_id") != url:
        raise DocumentRefused("client_id is not the URL of the document")
    if metadata.get("client_secret") is not None:
        raise DocumentRefused("the document has a client_secret, which is public")
    uris = _redirect_uris(metadata, schemes)
    name = metadata.get("client_name") or redirect_uris.host(url)
    if not isinstance(name, str) or is_too_long(clean_name(name)):
        raise DocumentRefused("client_name is not a string, or too long")
    methods = auth_methods(metadata)
    jwks_uri = metadata.get("jwks_uri") or ""
    jwks = metadata.get("jwks")
    if not isinstance(jwks_uri, str) or not isinstance(jwks, dict | None):
        raise DocumentRefused("jwks_uri is not a string, or jwks is not an object")
    if AuthMethod.PRIVATE_KEY_JWT in methods and not jwks and not jwks_uri:
        methods -= {AuthMethod.PRIVATE_KEY_JWT}
    if not methods:
        raise DocumentRefused(
            "no method of token_endpoint_auth_method is offered here: none, or private_key_jwt with keys"
        )
    return Client(
        url,
        url,
        ClientKind.DOCUMENT,
        clean_name(name) or redirect_uris.host(url),
        uris,
        AuthMethod.NONE if AuthMethod.NONE in methods else AuthMethod.PRIVATE_KEY_JWT,
        jwks=json.dumps(jwks) if jwks else None,
        jwks_uri="" if jwks else jwks_uri,
    )


def auth_methods(metadata: Mapping[str, Any]) -> frozenset[AuthMethod]:
    """The offered methods that a document names; `none` if it names none, since a document cannot hold a secret."""
    named = metadata.get("token_endpoint_auth_methods_supported")
    named = [] if named is None else named
    if not isinstance(named, list):
        raise DocumentRefused("token_endpoint_auth_methods_supported is not an array")
    one = metadata.get("token_endpoint_auth_method")
    every = [*named, one] if one is not None else named
    return frozenset(_METHODS[name] for name in every or ["none"] if isinstance(name, str) and name in _METHODS)


def json_object(content: bytes) -> dict[str, Any]:
    """The members of a JSON object. Raises DocumentRefused."""
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        raise DocumentRefused("the document is not JSON") from None
    if not isinstance(found, dict):
        raise DocumentRefused("the document is not a JSON object")
    return found


def _redirect_uris(metadata: Mapping[str, Any], schemes: frozenset[str]) -> tuple[str, ...]:
    uris = metadata.get("redirect_uris")
    if not isinstance(uris, list) or len(uris) > REDIRECT_URIS_MAX:
        raise DocumentRefused(f"redirect_uris is not an array of at most {REDIRECT_URIS_MAX} URIs")
    found = tuple(uri for uri in uris if isinstance(uri, str) and redirect_uris.fault(uri, schemes) is None)
    if not found:
        raise DocumentRefused("redirect_uris has no acceptable URI")
    return found


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
