"""TLS on both sides: TLS 1.2 or later, and nobody believed whose certificate does not verify."""

from __future__ import annotations

import re
import ssl
import sys
from typing import Final

from keyproxy.config import schema
from keyproxy.wire.handshake import PROTOCOL, TlsContext, refuse_other_protocols

#: Attribute types of a distinguished name, by OpenSSL's long names. RFC 4514 section 3.
_SHORT_NAMES: Final = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}

#: What stands for itself in a header and in a distinguished name; all else is written as hexadecimal pairs.
_PLAIN = re.compile(r"[A-Za-z0-9._:@/ -]")


class TlsError(Exception):
    """A certificate, key or list of authorities that cannot be used. The text says which file and why."""


def server_context(certificate_file: str, key_file: str, client_ca_file: str = "") -> ssl.SSLContext:
    """For the proxied port. `client_ca_file`: clients have to show a certificate of one of these. Raises TlsError."""
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that offers nothing but HTTP/2 learns that in the handshake and not by a 400. OpenSSL's own callback for
    # ALPN, as Python sets it, goes on without a protocol.
    context.set_alpn_protocols([PROTOCOL.decode("ascii")])
    context.sni_callback = refuse_other_protocols
    show(context, certificate_file, key_file)
    if client_ca_file:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(client_ca_file)
        except (OSError, ssl.SSLError) as error:
            raise TlsError(f"{client_ca_file}: {_why(error)}") from error
    return context


def _context(protocol: int) -> TlsContext:
    """As `ssl.create_default_context` makes it, which makes no subclass."""
    context = TlsContext(protocol)
    if sys.version_info >= (3, 13):
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    return context


def show(context: ssl.SSLContext, certificate_file: str, key_file: str) -> None:
    """From the next handshake on the context shows this certificate. Raises TlsError."""
    try:
        context.load_cert_chain(certificate_file, key_file or None, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        files = f"{certificate_file} with {key_file}" if key_file else certificate_file
        raise TlsError(f"{files}: {_why_unusable(error, key_file)}") from error


def client_context(ca_file: str = "") -> ssl.SSLContext:
    """For an https upstream: its name is verified. `ca_file`: instead of the system's authorities. Raises TlsError."""
    try:
        context = _context(ssl.PROTOCOL_TLS_CLIENT)
        if ca_file:
            context.load_verify_locations(ca_file)
        else:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"{ca_file}: {_why(error)}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([PROTOCOL.decode("ascii")])
    return context


def upstream_context(upstream: schema.Upstream) -> ssl.SSLContext | None:
    """How its certificates are verified; None if it has none. Raises TlsError.

    The system's authorities take a tenth of a second to load: only where they are needed.
    """
    is_https = any(url.lower().startswith("https:") for url in (upstream.url, upstream.test_url))
    return client_context(upstream.tls_ca_file) if is_https or upstream.tls_ca_file else None


def certificate_subject(tls: ssl.SSLObject) -> str | None:
    """The subject of the peer's verified certificate as RFC 4514 writes it, most specific first; None without one."""
    certificate = tls.getpeercert()
    if not certificate:
        return None
    return ",".join(
        "+".join(f"{_SHORT_NAMES.get(kind, kind)}={_escaped(value)}" for kind, value in relative)
        for relative in reversed(certificate["subject"])
    )


def was_closed(tls: ssl.SSLObject | None) -> bool:
    """Whether the end of a connection was said by the peer, and not made by somebody on the way.

    Without TLS there is no telling; with it the peer says so. RFC 9112 section 9.8.
    """
    if tls is None:
        return True
    try:
        return not tls.read(1)
    except ssl.SSLZeroReturnError:
        return True
    except ssl.SSLError:
        return False


def _escaped(value: str) -> str:
    text = "".join(
        one if _PLAIN.fullmatch(one) else "".join(f"\\{byte:02X}" for byte in one.encode("utf-8")) for one in value
    )
    # Spaces at the edges would be taken for space around the value.
    return re.sub(r"^ | $", r"\\20", text)


def _no_password() -> str:
    raise ValueError("the key is encrypted, and there is nobody to ask for its password")


def _why_unusable(error: BaseException, key_file: str) -> str:
    """OpenSSL names its own functions; the two mistakes that operators make most are put into words."""
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return "the key does not belong to the certificate"
    if isinstance(error, ssl.SSLError) and not error.reason:
        if key_file:
            return "the first holds no certificate in PEM, or the second no private key"
        return "it does not hold both a certificate and its private key in PEM; name the key's own file in tls_key_file"
    return _why(error)


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
