"""The rows of Django: their packages, database and broker."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

import psycopg
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
    with psycopg.connect(deployment.app_dsn) as connection:
        rows = connection.execute("SELECT id FROM keyproxy.users ORDER BY id").fetchall()
        assert rows == [("u_service_acme",), ("u_service_globex",)]


def test_broker_responds(deployment: Deployment) -> None:
    with redis.Redis(unix_socket_path=deployment.broker_url.removeprefix("redis+socket://")) as broker:
        assert broker.ping()
