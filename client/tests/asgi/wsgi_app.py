"""The application of WSGI behind keyproxy in the tests. gunicorn serves it at a unix socket and at a TCP port."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from keyproxy_client.identity import ENVIRON_KEY, Identity, Trust
from keyproxy_client.wsgi import IdentityMiddleware


def shown(found: Identity | None) -> dict[str, Any] | None:
    """An identity as JSON."""
    return None if found is None else {**dataclasses.asdict(found), "scopes": sorted(found.scopes)}


def _respond(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    names = [name for name in environ if "KEYPROXY" in name.upper() and name.startswith("HTTP_")]
    body = json.dumps({"identity": shown(environ[ENVIRON_KEY]), "names": names}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


_APPS = {path: IdentityMiddleware(_respond, trust=trust) for path, trust in (
    ("/unix", Trust.unix()), ("/loopback", Trust.loopback()), ("/private", Trust.loopback(["10.0.0.0/8"])),
)}  # fmt: skip


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """By the path, the same application under another trust rule."""
    return _APPS[environ["PATH_INFO"]](environ, start_response)
