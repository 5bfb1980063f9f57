"""`keyproxy config check`: reports all problems of a configuration at once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from tests.acceptance.conftest import Configure
from tests.rawhttp import free_port

MakeCertificate = Callable[..., tuple[str, str]]


@pytest.fixture
def make_certificate(tmp_path: Path) -> MakeCertificate:
    """Make a self-signed certificate: `make_certificate(name, days)`; its file and its key's."""

    def making(name: str, *, begins: str = "20200101000000Z", ends: str = "20400101000000Z") -> tuple[str, str]:
        certificate, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost"]
        request = tmp_path / f"{name}.csr"
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key)]
        commands = [
            ["openssl", "req", "-new", *new_key, *subject, "-out", str(request)],
            [
                "openssl",
                "ca",
                "-batch",
                "-selfsign",
                "-config",
                str(_authority(tmp_path, name)),
                "-in",
                str(request),
                "-keyfile",
                str(key),
                "-startdate",
                begins,
                "-enddate",
                ends,
                "-out",
                str(certificate),
                "-notext",
            ],
        ]
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        return str(certificate), str(key)

    return making


def _authority(directory: Path, name: str) -> Path:
    home = directory / f"{name}.ca"
    home.mkdir()
    (home / "index").write_text("")
    (home / "serial").write_text("01\n")
    config = home / "config"
    config.write_text(
        f"[ca]\ndefault_ca = here\n[here]\ndatabase = {home}/index\nserial = {home}/serial\nnew_certs_dir = {home}\n"
        "default_md = sha256\npolicy = any\nx509_extensions = v3\n[any]\ncommonName = supplied\n"
        "[v3]\nbasicConstraints = CA:TRUE\n"
    )
    return config


async def test_a_configuration_in_order_is_ok(
    configure: Configure, dsn: str, make_certificate: MakeCertificate
) -> None:
    certificate, key = make_certificate("good")
    site = configure(
        dsn,
        listen={"tls_certificate_file": certificate, "tls_key_file": key, "tls_client_ca_file": certificate},
        admin={"tls_certificate_file": certificate, "tls_key_file": key},
        upstream={"tls_ca_file": certificate},
        routes=[{"match": "POST /v1/jobs"}, {"match": "* /v1/{rest...}"}],
    )
    for options in ((), ("--offline",)):
        output = await site.run("config", "check", *options)
        assert (output.status, output.out, output.err) == (0, "ok\n", "")


async def test_everything_that_is_wrong_is_reported_at_once(
    configure: Configure, make_certificate: MakeCertificate
) -> None:
    good, _ = make_certificate("good")
    _, other_key = make_certificate("other")
    expired = make_certificate("expired", ends="20200102000000Z")
    nothing = Path(good).with_name("nothing.pem")
    nothing.write_text("no certificate\n")
    site = configure(
        f"postgresql://kp:hunter2@127.0.0.1:{free_port()}/kp",
        listen={"tls_certificate_file": good, "tls_key_file": other_key, "tls_client_ca_file": str(nothing)},
        admin={"tls_certificate_file": expired[0], "tls_key_file": expired[1]},
        upstream={"tls_ca_file": expired[0]},
        cache={"fresh_seconds": 9.0, "stale_seconds": 1.0},
        routes=[{"match": "* /v1/{rest...}"}, {"match": "POST /v1/jobs", "scopes": ["jobs:write"]}],
    )
    expected = (
        "cache.stale_seconds: must not be less",
        "listen.tls_certificate_file: ",
        "admin.tls_certificate_file: ",
        "listen.tls_client_ca_file: ",
        "upstream.tls_ca_file: ",
        "routes[2]: 'POST /v1/jobs' never matches",
        "store.dsn: ",
    )
    for options, beginnings in (((), expected), (("--offline",), expected[:-1])):
        output = await site.run("config", "check", *options)
        assert (output.status, output.out) == (2, "")
        lines = [line.removeprefix("keyproxy: ") for line in output.err.splitlines()]
        assert len(lines) == len(beginnings), lines
        for line, beginning in zip(lines, beginnings, strict=True):
            assert line.startswith(beginning)
    assert "has expired" in output.err
    assert "every certificate in it has expired" in output.err
    assert "hunter2" not in output.err


@pytest.mark.parametrize(
    ("begins", "ends", "sentence"),
    [
        ("20380101000000Z", "20400101000000Z", "is not valid yet"),
        ("20200101000000Z", "20210101000000Z", "has expired"),
    ],
)
async def test_a_certificate_counts_by_its_times(
    configure: Configure, dsn: str, make_certificate: MakeCertificate, begins: str, ends: str, sentence: str
) -> None:
    certificate, key = make_certificate("one", begins=begins, ends=ends)
    site = configure(dsn, listen={"tls_certificate_file": certificate, "tls_key_file": key})
    output = await site.run("config", "check", "--offline")
    assert (output.status, output.err) == (2, f"keyproxy: listen.tls_certificate_file: {certificate}: {sentence}\n")


async def test_missing_files_are_named(configure: Configure, dsn: str) -> None:
    site = configure(
        dsn,
        listen={"tls_certificate_file": "/nowhere/a.pem", "tls_client_ca_file": "/nowhere/b.pem"},
        upstream={"tls_ca_file": "/nowhere/c.pem"},
    )
    output = await site.run("config", "check", "--offline")
    assert output.status == 2
    for name in ("a", "b", "c"):
        assert f"/nowhere/{name}.pem: No such file" in output.err


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("with_key", "sentence"),
    [
        ("other", "the key does not belong to the certificate"),
        ("itself", "the first contains no PEM certificate, or the second no private key"),
        ("", "name the key's own file in tls_key_file"),
    ],
)
async def test_a_certificate_without_its_key_is_reported(
    configure: Configure, dsn: str, make_certificate: MakeCertificate, workers: int, with_key: str, sentence: str
) -> None:
    certificate, _ = make_certificate("one")
    _, other = make_certificate("other")
    key = {"other": other, "itself": certificate, "": ""}[with_key]
    listen = {"tls_certificate_file": certificate, "tls_key_file": key, "workers": workers}
    site = configure(dsn, listen=listen)
    for command in (("config", "check"), ("serve",)):
        output = await site.run(*command)
        assert (output.status, output.out, len(output.err.splitlines())) == (2, "", 1), command
        assert sentence in output.err


@pytest.mark.parametrize("is_old", [False, True])
async def test_every_command_requires_migrate_first(configure: Configure, empty_dsn: str, is_old: bool) -> None:
    site = configure(empty_dsn)
    if is_old:
        await site.run("migrate")
        connection = await asyncpg.connect(empty_dsn)
        await connection.execute("DELETE FROM keyproxy.migrations WHERE number = 10")
        await connection.close()
    commands = (
        ("tenant", "list"), ("key", "whose", "x"), ("usage", "show"), ("audit", "list"), ("key", "remind", "--dry-run"),
        ("admin", "token", "list"), ("serve",), ("admin",),
    )  # fmt: skip
    for command in commands:
        output = await site.run(*command)
        assert (output.status, output.out) == (1, "")
        (line,) = output.err.splitlines()
        assert "run keyproxy migrate" in line
    check = await site.run("config", "check")
    assert check.status == 2
    (line,) = check.err.splitlines()
    assert line.startswith("keyproxy: store.dsn: ")
    assert "run keyproxy migrate" in line
