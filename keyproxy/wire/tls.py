"""TLS on both sides: TLS 1.2 or later, and certificates are always verified."""

from __future__ import annotations

import hashlib
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

#: Characters that need no escape in a header or in a distinguished name; all others are written as hexadecimal pairs.
_PLAIN = re.compile(r"[A-Za-z0-9._:@/ -]")


class TlsError(Exception):
    """A certificate, key or CA file that cannot be used. The message contains the file and the reason."""


def server_context(
    certificate_file: str, key_file: str, client_ca_file: str = "", *, requires_client_certificates: bool = True
) -> ssl.SSLContext:
    """For the proxied port. `client_ca_file`: verifies the certificates of clients. Raises TlsError.

    Not `requires_client_certificates`: clients without one are accepted; those with an invalid one are not.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that offers only HTTP/2 gets an alert in the handshake, not a 400. OpenSSL's own callback for ALPN, as
    # Python sets it, would continue without a protocol.
    context.set_alpn_protocols([PROTOCOL.decode("ascii")])
    context.sni_callback = refuse_other_protocols
    show(context, certificate_file, key_file)
    if client_ca_file:
        context.verify_mode = ssl.CERT_REQUIRED if requires_client_certificates else ssl.CERT_OPTIONAL
        try:
            context.load_verify_locations(client_ca_file)
        except (OSError, ssl.SSLError) as error:
            raise TlsError(f"{client_ca_file}: {_why(error)}") from error
    return context


def _context(protocol: int) -> TlsContext:
    """Create a context with the settings of `ssl.create_default_context`, which cannot create a subclass."""
    context = TlsContext(protocol)
    if sys.version_info >= (3, 13):
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    return context


def show(context: ssl.SSLContext, certificate_file: str, key_file: str) -> None:
    """Use this certificate from the next handshake on. Raises TlsError."""
    try:
        context.load_cert_chain(certificate_file, key_file or None, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        files = f"{certificate_file} with {key_file}" if key_file else certificate_file
        raise TlsError(f"{files}: {_why_unusable(error, key_file)}") from error


def client_context(ca_file: str = "") -> ssl.SSLContext:
    """For an https upstream, with hostname checks. `ca_file`: replaces the system's CAs. Raises TlsError."""
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
    """Return the context that verifies the upstream's certificates; None if it has none. Raises TlsError.

    Loading the system's CAs takes a tenth of a second, so they are loaded only if needed.
    """
    is_https = any(url.lower().startswith("https:") for url in (upstream.url, upstream.test_url))
    return client_context(upstream.tls_ca_file) if is_https or upstream.tls_ca_file else None


def certificate_subject(tls: ssl.SSLObject) -> str | None:
    """Return the subject of the peer's verified certificate in RFC 4514 form, most specific first; None without one."""
    certificate = tls.getpeercert()
    if not certificate:
        return None
    return ",".join(
        "+".join(f"{_SHORT_NAMES.get(kind, kind)}={_escaped(value)}" for kind, value in relative)
        for relative in reversed(certificate["subject"])
    )


def certificate_digest(tls: ssl.SSLObject) -> bytes:
    """Return the SHA-256 of the peer's verified certificate in DER; empty without one."""
    certificate = tls.getpeercert(binary_form=True)
    return hashlib.sha256(certificate).digest() if certificate else b""


def was_closed(tls: ssl.SSLObject | None) -> bool:
    """Whether the peer itself ended the connection, and not a third party on the network path.

    Only TLS can distinguish these, by the closure alert; without TLS this is always true. RFC 9112 section 9.8.
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
    # Leading and trailing spaces would be read as padding around the value.
    return re.sub(r"^ | $", r"\\20", text)


def _no_password() -> str:
    raise ValueError("the key is encrypted, and no password can be entered")


def _why_unusable(error: BaseException, key_file: str) -> str:
    """Describe the two most frequent mistakes in words; OpenSSL's messages name its own functions."""
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return "the key does not belong to the certificate"
    if isinstance(error, ssl.SSLError) and not error.reason:
        if key_file:
            return "the first contains no PEM certificate, or the second no private key"
        return "it does not contain both a PEM certificate and its private key; name the key's own file in tls_key_file"
    return _why(error)


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
