"""The test project, its database, and what tests of Django share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from deployment import Deployment

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

import django

django.setup()

from django.contrib.auth import get_user_model  # noqa: E402 - models exist after the setup
from django.core.management import call_command  # noqa: E402
from django.db import connection, connections, transaction  # noqa: E402


@pytest.fixture(scope="session")
def tables() -> Iterator[None]:
    """The tables of the test project."""
    deployment = Deployment.named()
    if deployment is not None:
        _allow_tables(deployment)
    call_command("migrate", run_syncdb=True, verbosity=0)
    yield
    connections.close_all()


def _allow_tables(deployment: Deployment) -> None:
    import psycopg
    from psycopg import sql
    from psycopg.conninfo import conninfo_to_dict

    role = str(conninfo_to_dict(deployment.app_dsn)["user"])
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute(sql.SQL("GRANT CREATE, USAGE ON SCHEMA public TO {}").format(sql.Identifier(role)))


@pytest.fixture
def db(tables: None) -> Iterator[None]:
    """The database in a transaction that is rolled back."""
    with transaction.atomic():
        yield
        transaction.set_rollback(True)


@pytest.fixture
def committing_db(tables: None) -> Iterator[None]:
    """The database in autocommit mode, for tests with other processes or connections. Users are deleted afterwards."""
    yield
    get_user_model().objects.all().delete()
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM keyproxy_outbox")
