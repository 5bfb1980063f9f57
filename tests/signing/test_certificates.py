"""The subject of a client's certificate is compared exactly, and its thumbprint is that of RFC 8705."""

from __future__ import annotations

import datetime
import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from keyproxy.signing.certificates import has_subject, subject_fault, thumbprint

KEY = ec.generate_private_key(ec.SECP256R1())
BEGIN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
SPIFFE = "spiffe://example.com/worker"


def certificate(*names: x509.GeneralName) -> bytes:
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Acme, Inc."), x509.NameAttribute(NameOID.COMMON_NAME, "worker")]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(BEGIN)
        .not_valid_after(BEGIN + datetime.timedelta(days=1))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


NAMED = certificate(
    x509.DNSName("worker.example.com"), x509.DNSName("*.pool.example.com"), x509.UniformResourceIdentifier(SPIFFE)
)
PLAIN = certificate()


@pytest.mark.parametrize(
    ("der", "subject", "matches"),
    [
        (NAMED, "dns:worker.example.com", True),
        (NAMED, "dns:*.pool.example.com", True),
        (NAMED, "dns:a.pool.example.com", False),
        (NAMED, "dns:WORKER.example.com", False),
        (NAMED, "dns:example.com", False),
        (NAMED, "dns:worker", False),
        (NAMED, f"dns:{SPIFFE}", False),
        (NAMED, f"uri:{SPIFFE}", True),
        (NAMED, f"uri:{SPIFFE}/", False),
        (NAMED, "uri:worker.example.com", False),
        (NAMED, "dn:CN=worker,O=Acme\\, Inc.", True),
        (PLAIN, "dn:CN=worker,O=Acme\\, Inc.", True),
        (PLAIN, "dn:O=Acme\\, Inc.,CN=worker", False),
        (PLAIN, "dn:CN=worker", False),
        (PLAIN, "dn:CN=worker,O=Acme", False),
        (PLAIN, "dns:worker", False),
        (PLAIN, "worker", False),
        (b"", "dns:worker.example.com", False),
        (NAMED[:-1], "dns:worker.example.com", False),
    ],
)
def test_certificate_has_exactly_the_registered_subject(der: bytes, subject: str, *, matches: bool) -> None:
    assert has_subject(der, subject) is matches


@pytest.mark.parametrize(
    ("subject", "is_valid"),
    [
        ("dns:worker.example.com", True),
        (f"uri:{SPIFFE}", True),
        ("dn:CN=worker,O=Acme\\, Inc.", True),
        ("worker.example.com", False),
        ("DNS:worker.example.com", False),
        ("dns:", False),
        ("dn:worker", False),
        ("dns:a\nb", False),
        ("dns:" + "a" * 1_001, False),
        ("", False),
    ],
)
def test_registered_subject_names_its_kind(subject: str, *, is_valid: bool) -> None:
    assert (subject_fault(subject) is None) is is_valid


def test_thumbprint_is_sha_256_of_the_certificate() -> None:
    assert thumbprint(NAMED) == hashlib.sha256(NAMED).digest()
