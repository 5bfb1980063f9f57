"""The metadata of the authorization server (RFC 8414), also where OpenID Connect clients look, and of its resources."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import Endpoint, Handler
from keyproxy.config.addresses import port_of
from keyproxy.config.oauth.oauth_settings import LANGUAGES, OFF, OAuthSettings
from keyproxy.oauth.discovery.server_metadata import server_metadata
from keyproxy.oauth.protected_resource import document, paths

_SERVER: Final = "/.well-known/oauth-authorization-server"
_OPENID: Final = "/.well-known/openid-configuration"


def metadata_endpoints(context: Context) -> Sequence[Endpoint]:
    """The endpoints of the metadata. Their bytes are made here, so that responses never wait."""
    settings = context.settings.oauth
    path = urlsplit(settings.issuer).path
    places = [_SERVER, _OPENID]
    if path:
        # RFC 8414 inserts the well-known part before the issuer's path; OpenID Connect appends it.
        places += [_SERVER + path, _OPENID + path, path + _OPENID]
    server = Endpoint(
        "metadata", tuple(places), {"GET": _handler({"": _server_metadata(settings)})}, is_cross_origin=True
    )
    return [server, *_resource_metadata(settings)]


def _resource_metadata(settings: OAuthSettings) -> Iterator[Endpoint]:
    """The metadata of the resources, as the proxy publishes them. If they have one path, the Host selects."""
    by_path: dict[str, dict[str, bytes]] = defaultdict(dict)
    for resource in filter(None, (settings.resource, settings.test_resource)):
        content = document(resource, settings.issuer, settings.scopes)
        for path in paths(resource):
            by_path[path].setdefault(urlsplit(resource).netloc.lower(), content)
    for path, by_host in by_path.items():
        yield Endpoint("resource_metadata", (path,), {"GET": _handler(by_host)}, is_cross_origin=True)


def _server_metadata(settings: OAuthSettings) -> bytes:
    return server_metadata(
        settings.issuer,
        scopes=settings.scopes,
        languages=LANGUAGES,
        can_register=settings.registration != OFF,
        has_documents=settings.documents != OFF,
        mtls_port=port_of(settings.mtls_address),
    )


def _handler(by_host: Mapping[str, bytes]) -> Handler:
    """Respond with the document of the Host, or with the first one."""
    first = next(iter(by_host.values()))

    async def handle(request: web.Request) -> web.Response:
        content = by_host.get(request.headers.get("Host", "").lower(), first)
        return web.Response(body=content, content_type="application/json")

    return handle
