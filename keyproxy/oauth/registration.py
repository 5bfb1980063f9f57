"""Dynamic client registration, RFC 7591, as a pure function: the id that is returned encodes the metadata.

Nothing is stored and no secret is made, so a program may register as often as it likes, before or after it authorizes.
"""

from __future__ import annotations

import json
from typing import Any, Final

from keyproxy.oauth.client import CLIENT_ID_BYTES_MAX, NAME_CHARACTERS_MAX, REDIRECT_URIS_MAX, AuthMethod
from keyproxy.oauth.client_ids import encode_value_id
from keyproxy.oauth.client_policy import ClientPolicy
from keyproxy.oauth.names import clean_name, is_too_long
from keyproxy.oauth.oauth_error import OAuthError

#: What every registered program may use, whatever it has asked for.
GRANT_TYPES: Final = ("authorization_code", "refresh_token")
RESPONSE_TYPES: Final = ("code",)
AUTH_METHOD: Final = AuthMethod.NONE

_BAD_URI: Final = "invalid_redirect_uri"
_BAD_METADATA: Final = "invalid_client_metadata"


def register(body: bytes, policy: ClientPolicy) -> bytes:
    """The response to a registration. Raises OAuthError."""
    if not policy.registers:
        raise OAuthError(_BAD_METADATA, "registration is not offered", status=404)
    metadata = _members(body)
    uris, name = _redirect_uris(metadata, policy), _name(metadata)
    _check_offered(metadata, "grant_types", GRANT_TYPES[0])
    _check_offered(metadata, "response_types", RESPONSE_TYPES[0])
    client_id = encode_value_id(uris, name)
    if len(client_id) > CLIENT_ID_BYTES_MAX:
        raise OAuthError(
            _BAD_METADATA, f"the name and the redirect URIs make an id of over {CLIENT_ID_BYTES_MAX} bytes"
        )
    response: dict[str, object] = {"client_id": client_id}
    if name:
        response["client_name"] = name
    response["redirect_uris"] = uris
    response["token_endpoint_auth_method"] = AUTH_METHOD.value
    response["grant_types"] = GRANT_TYPES
    response["response_types"] = RESPONSE_TYPES
    return json.dumps(response, separators=(",", ":")).encode("ascii")


def _members(body: bytes) -> dict[str, Any]:
    """The members of the request that are not null."""
    try:
        content = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise OAuthError(_BAD_METADATA, "the body is not JSON") from None
    if not isinstance(content, dict):
        raise OAuthError(_BAD_METADATA, "the body is not a JSON object")
    return {name: value for name, value in content.items() if value is not None}


def _redirect_uris(metadata: dict[str, Any], policy: ClientPolicy) -> list[str]:
    uris = metadata.get("redirect_uris")
    if not isinstance(uris, list) or not uris or not all(isinstance(uri, str) for uri in uris):
        raise OAuthError(_BAD_URI, "redirect_uris must be an array with at least one URI")
    if len(uris) > REDIRECT_URIS_MAX:
        raise OAuthError(_BAD_URI, f"redirect_uris has more than {REDIRECT_URIS_MAX} URIs")
    fault = policy.registration_fault(uris)
    if fault is not None:
        raise OAuthError(_BAD_URI, fault)
    return uris


def _name(metadata: dict[str, Any]) -> str:
    name = metadata.get("client_name", "")
    if not isinstance(name, str):
        raise OAuthError(_BAD_METADATA, "client_name must be a string")
    name = clean_name(name)
    if is_too_long(name):
        raise OAuthError(_BAD_METADATA, f"client_name has more than {NAME_CHARACTERS_MAX} characters")
    return name


def _check_offered(metadata: dict[str, Any], member: str, needed: str) -> None:
    """Refuse a program that cannot work here. The response has what it may use in place of what it has asked for."""
    wanted = metadata.get(member, [])
    if not isinstance(wanted, list) or not all(isinstance(one, str) for one in wanted):
        raise OAuthError(_BAD_METADATA, f"{member} must be an array of strings")
    if wanted and needed not in wanted:
        raise OAuthError(_BAD_METADATA, f"{member} must contain {needed}: no other kind of client can register")
