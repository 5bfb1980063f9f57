"""The rows of Django: their packages, database and broker."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

import psycopg
import pytest
import redis

from deployment import Deployment


def test_row_has_the_named_versions() -> None:
    row = os.environ["KEYPROXY_CLIENT_ROW"]
    environment, _, python = row.partition("-")
    assert python == ".".join(map(str, sys.version_info[:2]))
    wanted = {"dj52": ("5.2", "5.5"), "djnew": ("6.1", "5.7")}[environment]
    found = tuple(".".join(version(name).split(".")[:2]) for name in ("django", "celery"))
    assert found == wanted


def test_application_role_reads_users_and_no_digest(deployment: Deployment) -> None:
    with psycopg.connect(deployment.app_dsn, autocommit=True) as connection:
        row = connection.execute("SELECT tenant_id FROM keyproxy.users WHERE id = 'u_service_acme'").fetchone()
        assert row == ("acme",)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT digest FROM keyproxy.api_keys")


def test_broker_responds(deployment: Deployment) -> None:
    with redis.Redis(unix_socket_path=deployment.broker_url.removeprefix("redis+socket://")) as broker:
        assert broker.ping()
