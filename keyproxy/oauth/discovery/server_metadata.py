"""The metadata of the authorization server as JSON: RFC 8414, RFC 8705 section 5, RFC 9207."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from keyproxy.oauth.client import AuthMethod

AUTHORIZE: Final = "/oauth/authorize"
TOKEN: Final = "/oauth/token"  # noqa: S105 - a path
REGISTER: Final = "/oauth/register"
REVOKE: Final = "/oauth/revoke"
INTROSPECT: Final = "/oauth/introspect"

#: The algorithms of assertions that authenticate clients.
ASSERTION_ALGORITHMS: Final = ("RS256", "PS256", "ES256", "EdDSA")

_CONFIDENTIAL: Final = ("client_secret_basic", "client_secret_post", AuthMethod.PRIVATE_KEY_JWT.value)


def origin(url: str) -> str:
    """The origin of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def server_metadata(
    issuer: str,
    *,
    scopes: Sequence[str],
    languages: Sequence[str],
    can_register: bool,
    has_documents: bool,
    mtls_port: int | None,
) -> bytes:
    """Build the document. The endpoints are at the root of the issuer's origin.

    `has_documents`: client ids may be URLs of metadata documents. `mtls_port`: of the listener for clients with
    certificates, None: there is none.
    """
    root = origin(issuer)
    confidential = [*_CONFIDENTIAL, *([AuthMethod.TLS_CLIENT_AUTH.value] if mtls_port else [])]
    document: dict[str, object] = {
        "issuer": issuer,
        "authorization_endpoint": root + AUTHORIZE,
        "token_endpoint": root + TOKEN,
        "revocation_endpoint": root + REVOKE,
        "introspection_endpoint": root + INTROSPECT,
        "scopes_supported": list(scopes),
        "response_types_supported": ["code"],
        "response_modes_supported": ["query"],
        "grant_types_supported": ["authorization_code", "refresh_token", "client_credentials"],
        "token_endpoint_auth_methods_supported": [AuthMethod.NONE.value, *confidential],
        "token_endpoint_auth_signing_alg_values_supported": list(ASSERTION_ALGORITHMS),
        "revocation_endpoint_auth_methods_supported": [AuthMethod.NONE.value, *confidential],
        "revocation_endpoint_auth_signing_alg_values_supported": list(ASSERTION_ALGORITHMS),
        "introspection_endpoint_auth_methods_supported": confidential,
        "introspection_endpoint_auth_signing_alg_values_supported": list(ASSERTION_ALGORITHMS),
        "code_challenge_methods_supported": ["S256"],
        "authorization_response_iss_parameter_supported": True,
        "client_id_metadata_document_supported": has_documents,
        "ui_locales_supported": list(languages),
    }
    if can_register:
        document["registration_endpoint"] = root + REGISTER
    if mtls_port:
        name = urlsplit(issuer).hostname or ""
        host = f"[{name}]" if ":" in name else name
        secure = f"https://{host}:{mtls_port}"
        document["tls_client_certificate_bound_access_tokens"] = True
        document["mtls_endpoint_aliases"] = {
            "token_endpoint": secure + TOKEN,
            "revocation_endpoint": secure + REVOKE,
            "introspection_endpoint": secure + INTROSPECT,
        }
    return json.dumps(document, separators=(",", ":")).encode()
