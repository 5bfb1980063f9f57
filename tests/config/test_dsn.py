"""Connection URIs: every parameter of libpq is applied, ignored because it has no effect, or rejected by name."""

from __future__ import annotations

import pytest

from keyproxy.config import dsn
from keyproxy.config.dsn import Dsn, InvalidDsnError

#: Every parameter of libpq 18, see its documentation.
LIBPQ = (
    "host", "hostaddr", "port", "dbname", "user", "password", "passfile", "require_auth", "channel_binding",
    "connect_timeout", "client_encoding", "options", "application_name", "fallback_application_name",
    "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout",
    "replication", "gssencmode", "sslmode", "requiressl", "sslnegotiation", "sslcompression", "sslcert",
    "sslkey", "sslkeylogfile", "sslpassword", "sslcertmode", "sslrootcert", "sslcrl", "sslcrldir", "sslsni",
    "requirepeer", "ssl_min_protocol_version", "ssl_max_protocol_version", "min_protocol_version",
    "max_protocol_version", "krbsrvname", "gsslib", "gssdelegation", "scram_client_key", "scram_server_key",
    "service", "servicefile", "target_session_attrs", "load_balance_hosts", "oauth_issuer", "oauth_client_id",
    "oauth_client_secret", "oauth_scope",
)  # fmt: skip


@pytest.mark.parametrize("name", LIBPQ)
def test_no_parameter_of_libpq_is_taken_for_a_setting_of_the_server(name: str) -> None:
    for value in ("1", "x", "require"):
        assert not _settings(f"{name}={value}"), value


def _settings(query: str) -> object:
    """The server settings in a query; none if it is rejected."""
    try:
        return dsn.parse(f"postgresql://h/d?{query}").settings
    except InvalidDsnError:
        return {}


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("postgresql://h", Dsn((("h", None),))),
        ("postgres://u:p%40%2F@h:1/d%20b", Dsn((("h", 1),), "u", "p@/", "d b")),
        ("postgresql:///d?host=a,b&port=1,2", Dsn((("a", 1), ("b", 2)), database="d")),
        ("postgresql:///?host=a,b&port=7&dbname=x&user=y", Dsn((("a", 7), ("b", 7)), "y", None, "x")),
        ("postgresql://a:1,b,[::1]:3/d", Dsn((("a", 1), ("b", None), ("::1", 3)), database="d")),
        ("postgresql:///?host=::1", Dsn((("::1", None),))),
        ("postgresql://%2Frun%2Fpg/d", Dsn((("/run/pg", None),), database="d")),
        ("postgresql://u@/d?host=/run/pg&port=5433", Dsn((("/run/pg", 5433),), "u", None, "d")),
        ("postgresql://h:1/d?host=other&port=2", Dsn((("h", 1),), database="d")),
        ("postgresql://h:5/d?hostaddr=10.0.0.1", Dsn((("10.0.0.1", 5),), database="d")),
        ("postgresql:///d?port=5433", Dsn((("", 5433),), database="d")),
        ("postgresql://h/d?database=e", Dsn((("h", None),), database="d")),
        ("postgresql://h?database=e", Dsn((("h", None),), database="e")),
        ("postgresql://h?sslmode=require&connect_timeout=5",
         Dsn((("h", None),), parameters={"sslmode": "require", "connect_timeout": "5"})),
        ("postgresql://h?requiressl=1", Dsn((("h", None),), parameters={"sslmode": "require"})),
        ("postgresql://h?work_mem=1MB&app.name=x", Dsn((("h", None),), settings={"work_mem": "1MB", "app.name": "x"})),
        ("postgresql://h?sslmode=", Dsn((("h", None),))),
    ],
)  # fmt: skip
def test_uri_is_parsed(uri: str, expected: Dsn) -> None:
    assert dsn.parse(uri) == expected


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("channel_binding=require", "channel_binding=require"),
        ("gssencmode=require", "gssencmode=require"),
        ("require_auth=scram-sha-256", "require_auth"),
        ("requirepeer=postgres", "requirepeer"),
        ("sslcrldir=/a", "sslcrldir"),
        ("sslcertmode=require", "sslcertmode=require"),
        ("sslsni=0", "sslsni=0"),
        ("scram_client_key=hunter2", "scram_client_key"),
        ("oauth_client_secret=hunter2", "oauth_client_secret"),
        ("replication=database", "replication=database"),
        ("min_protocol_version=3.2", "min_protocol_version=3.2"),
        ("sslmode=on", "sslmode"),
        ("target_session_attrs=standby", "target_session_attrs=standby"),
        ("target_session_attrs=prefer-standby", "target_session_attrs=prefer-standby"),
        ("target_session_attrs=read-only", "target_session_attrs=read-only"),
        ("connect_timeout=soon", "connect_timeout"),
        ("keepalives_idle=1s", "keepalives_idle"),
        ("sslrootcert=system&sslmode=require", "sslrootcert=system"),
        ("sslnegotiation=direct", "sslnegotiation=direct"),
        ("hostaddr=10.0.0.1&sslmode=verify-full", "hostaddr"),
        ("gsslib=other", "gsslib"),
        ("a%20b=1", "'a b'"),
    ],
)  # fmt: skip
def test_unsupported_parameter_is_rejected_by_name_without_secrets(query: str, named: str) -> None:
    with pytest.raises(InvalidDsnError) as caught:
        dsn.parse(f"postgresql://u:hunter2@h/d?{query}")
    assert named in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "mysql://h", "postgresql://h:0", "postgresql://h:65536", "postgresql://h:x", "postgresql://[::1", "postgresql://h?x",
        "postgresql:///?host=a,b&port=1,2,3", "postgresql://a,b?hostaddr=10.0.0.1", "postgresql:///?port=x",
    ],
)  # fmt: skip
def test_invalid_uri_is_rejected(uri: str) -> None:
    with pytest.raises(InvalidDsnError):
        dsn.parse(uri)


def test_no_secret_is_shown_with_a_uri() -> None:
    parsed = dsn.parse("postgresql://u:hunter2@h/d?sslpassword=hunter2")
    assert "hunter2" not in repr(parsed)
    assert parsed.password == "hunter2"
