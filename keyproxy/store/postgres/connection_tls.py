"""TLS to PostgreSQL by libpq's rules: `sslmode`, certificates from the URI, the environment or ~/.postgresql.

asyncpg knows these rules too, but fails where the home directory belongs to another user, which is how containers run.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

#: libpq's parameter: its environment variable.
_VARIABLES: Final = {
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcrl": "PGSSLCRL",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
}
_VERSIONS: Final = {
    "TLSv1": ssl.TLSVersion.TLSv1,
    "TLSv1.1": ssl.TLSVersion.TLSv1_1,
    "TLSv1.2": ssl.TLSVersion.TLSv1_2,
    "TLSv1.3": ssl.TLSVersion.TLSv1_3,
}


class TlsParameterError(ValueError):
    """A TLS parameter is invalid. The message names it."""


def attempts(parameters: Mapping[str, str]) -> Sequence[ssl.SSLContext | bool]:
    """How to connect over TCP, in the order in which libpq tries: with a context, or False: without TLS.

    Raises TlsParameterError. Certificates are read each time, so that renewed ones take effect.
    """
    given = {
        name: value
        for name, variable in _VARIABLES.items()
        if (value := parameters.get(name) or os.environ.get(variable))
    } | {"sslpassword": parameters.get("sslpassword", "")}
    mode = given.get("sslmode", "verify-full" if given.get("sslrootcert") == "system" else "prefer")
    match mode:
        case "disable":
            return (False,)
        case "allow":
            return False, _context(mode, given)
        case "prefer":
            return _context(mode, given), False
        case "require" | "verify-ca" | "verify-full":
            return (_context(mode, given),)
    raise TlsParameterError(f"sslmode={mode} is not one that libpq knows")


def _context(mode: str, given: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "verify-full"
    context.verify_mode = ssl.CERT_NONE if mode in ("allow", "prefer") else _load_roots(context, mode, given)
    context.minimum_version = _version(given, "ssl_min_protocol_version") or ssl.TLSVersion.TLSv1_2
    maximum = _version(given, "ssl_max_protocol_version")
    if maximum is not None:
        context.maximum_version = maximum
    _load_certificate(context, given)
    # PostgreSQL 17 requires ALPN for direct TLS, which starts without PostgreSQL's SSLRequest.
    context.set_alpn_protocols(["postgresql"])
    return context


def _load_roots(context: ssl.SSLContext, mode: str, given: Mapping[str, str]) -> ssl.VerifyMode:
    roots = given.get("sslrootcert") or _in_home("root.crt")
    if roots == "system":
        context.load_default_certs()
    elif roots is not None:
        _load(context, "sslrootcert", roots)
    elif mode == "require":
        # As libpq: encrypted, without verifying the server.
        return ssl.CERT_NONE
    else:
        raise TlsParameterError(f"sslmode={mode} needs sslrootcert: a file of certificates, or sslrootcert=system")
    revoked = given.get("sslcrl") or _in_home("root.crl")
    if revoked is not None:
        _load(context, "sslcrl", revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    return ssl.CERT_REQUIRED


def _load(context: ssl.SSLContext, name: str, path: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ValueError) as error:
        raise TlsParameterError(f"{name}={path} cannot be read: {error}") from error


def _load_certificate(context: ssl.SSLContext, given: Mapping[str, str]) -> None:
    certificate = given.get("sslcert") or _in_home("postgresql.crt")
    if certificate is None:
        return
    key = given.get("sslkey") or _in_home("postgresql.key")
    try:
        context.load_cert_chain(certificate, key, password=lambda: given["sslpassword"])
    except (OSError, ValueError) as error:
        raise TlsParameterError(f"sslcert={certificate} or its sslkey cannot be read: {error}") from error


def _version(given: Mapping[str, str], name: str) -> ssl.TLSVersion | None:
    text = given.get(name)
    if text is None:
        return None
    if text not in _VERSIONS:
        raise TlsParameterError(f"{name}={text} is not one of {', '.join(_VERSIONS)}")
    return _VERSIONS[text]


def _in_home(name: str) -> str | None:
    """A readable file in ~/.postgresql, or None. HOME may belong to another user."""
    try:
        path = Path.home() / ".postgresql" / name
    except (RuntimeError, KeyError):
        return None
    return str(path) if os.access(path, os.R_OK) else None
