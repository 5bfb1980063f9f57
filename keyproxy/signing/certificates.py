"""Certificates of OAuth clients, RFC 8705: which registered subject one has, and its thumbprint."""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography import x509

#: The kinds of a `tls_subject`, by its start: a DNS name or URI among the alternative names, or the whole subject.
DNS: Final = "dns:"
URI: Final = "uri:"
DN: Final = "dn:"

_CHARACTERS_MAX: Final = 1_000


def subject_fault(tls_subject: str) -> str | None:
    """What is wrong with a `tls_subject`, as a predicate, or None."""
    kind = next((kind for kind in (DNS, URI, DN) if tls_subject.startswith(kind)), None)
    if kind is None:
        return f"must start with {DNS}, {URI} or {DN}"
    value = tls_subject.removeprefix(kind)
    if not value or len(value) > _CHARACTERS_MAX or not value.isprintable():
        return f"must have 1 to {_CHARACTERS_MAX} printable characters after {kind}"
    if kind == DN:
        try:
            x509.Name.from_rfc4514_string(value)
        except ValueError:
            return f"must have a distinguished name of RFC 4514 after {DN}, such as CN=worker,O=Example"
    return None


def has_subject(certificate: bytes, tls_subject: str) -> bool:
    """Whether a verified certificate (DER) has exactly this subject. Wildcards match nothing but themselves."""
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        if tls_subject.startswith(DN):
            return parsed.subject.rfc4514_string() == tls_subject.removeprefix(DN)
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if tls_subject.startswith(DNS):
            return tls_subject.removeprefix(DNS) in names.get_values_for_type(x509.DNSName)
        if tls_subject.startswith(URI):
            return tls_subject.removeprefix(URI) in names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return False
    return False


def thumbprint(certificate: bytes) -> bytes:
    """SHA-256 of a certificate (DER): the value of `x5t#S256`, and of `bound_to`."""
    return hashlib.sha256(certificate).digest()
