"""The metadata of the authorization server: RFC 8414, also where OpenID Connect clients look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import Endpoint
from keyproxy.config.addresses import port_of
from keyproxy.config.oauth.oauth_settings import LANGUAGES, OFF, OAuthSettings
from keyproxy.oauth.server_metadata import server_metadata

_SERVER: Final = "/.well-known/oauth-authorization-server"
_OPENID: Final = "/.well-known/openid-configuration"


def metadata_endpoints(context: Context) -> Sequence[Endpoint]:
    """The endpoints of the metadata. Their bytes are made here, so that responses never wait."""
    settings = context.settings.oauth
    path = urlsplit(settings.issuer).path
    paths = [_SERVER, _OPENID]
    if path:
        # RFC 8414 inserts the well-known part before the issuer's path; OpenID Connect appends it.
        paths += [_SERVER + path, _OPENID + path, path + _OPENID]
    return [_document("metadata", paths, _server_metadata(settings))]


def _server_metadata(settings: OAuthSettings) -> bytes:
    return server_metadata(
        settings.issuer,
        scopes=settings.scopes,
        languages=LANGUAGES,
        can_register=settings.registration != OFF,
        has_documents=settings.documents != OFF,
        mtls_port=port_of(settings.mtls_address),
    )


def _document(name: str, paths: Sequence[str], content: bytes) -> Endpoint:
    async def handle(_request: web.Request) -> web.Response:
        return web.Response(body=content, content_type="application/json")

    return Endpoint(name, tuple(paths), {"GET": handle}, is_cross_origin=True)
