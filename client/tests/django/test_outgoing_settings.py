"""HTTP clients from Django's settings: service keys by tenant and mode, and the keys of users."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured

from deployment import Deployment
from keyproxy_client import http
from keyproxy_client.acting import NoActingUser, acting_as
from keyproxy_client.http import SecretUnavailable
from project.testing import keyproxy_settings


def seen(content: Any) -> dict[str, str]:
    """The identity headers of a request at the echo server."""
    return {
        name.removeprefix("X-Keyproxy-"): value
        for name, value in content["headers"]
        if name in ("X-Keyproxy-User", "X-Keyproxy-Tenant", "X-Keyproxy-Test", "X-Keyproxy-Actor")
    }


async def posted_async(path: str) -> Any:
    """By an asynchronous client."""
    async with http.httpx_async_client() as client:
        return (await client.post(path)).json()


def test_clients_use_origin_and_service_keys_of_the_settings(deployment: Deployment) -> None:
    for tenant, test in (("acme", False), ("globex", False), ("acme", True)):
        with acting_as(f"u_service_{tenant}", tenant, test=test):
            user, mode = f"u_service_{tenant}", str(test).lower()
            expected = {"User": user, "Tenant": tenant, "Test": mode, "Actor": user}
            with http.httpx_client(timeout=10) as client, http.requests_session() as session:
                assert seen(client.post("/v1/ai/jobs").json()) == expected
                assert seen(session.post("/v1/ai/jobs", timeout=10).json()) == expected
            assert seen(asyncio.run(posted_async("/v1/ai/jobs"))) == expected


def test_tenant_of_the_settings_is_that_of_users_without_one(deployment: Deployment) -> None:
    with acting_as("u_service_acme"), http.httpx_client() as client:
        assert seen(client.get("/").json())["Tenant"] == "acme"
    with (
        keyproxy_settings(TENANT="project.testing.tenant_of_user"),
        acting_as("u_service_acme"),
        http.httpx_client() as client,
        pytest.raises(SecretUnavailable, match="tenant"),
    ):
        client.get("/")


def test_nothing_is_sent_without_an_acting_user(deployment: Deployment) -> None:
    with http.httpx_client() as client, pytest.raises(NoActingUser):
        client.get("/")
    with http.httpx_client(act_for=None) as client:
        assert seen(client.get("/").json())["User"] == "u_service_acme"


@pytest.mark.parametrize("key", ["ORIGIN", "SERVICE_KEY_FILE"])
@pytest.mark.parametrize("make", [http.httpx_client, http.httpx_async_client, http.requests_session])
def test_missing_setting_is_named(key: str, make: Any) -> None:
    complete = {"ORIGIN": "http://localhost", "SERVICE_KEY_FILE": "/run/secrets/key"}
    with keyproxy_settings(**{**complete, key: ""}), pytest.raises(ImproperlyConfigured, match=key):
        make()


def test_key_file_of_the_settings_is_read_again_when_it_changes(deployment: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "key"
    with keyproxy_settings(SERVICE_KEY_FILE=str(file)), http.httpx_client(act_for=None) as client:
        for tenant in ("acme", "globex"):
            new = tmp_path / "new"
            new.write_bytes(deployment.service_key_file(tenant).read_bytes())
            new.rename(file)
            assert seen(client.get("/").json())["Tenant"] == tenant


@pytest.mark.usefixtures("committing_db")
def test_per_user_credentials_are_the_keys_of_the_acting_users(deployment: Deployment) -> None:
    with keyproxy_settings(BACKEND="sql", CREDENTIALS="per_user", SECRET_KEYS=[Fernet.generate_key().decode()]):
        user = get_user_model().objects.create_user("outgoing")
        for test in (False, True):
            with acting_as(user, test=test):
                expected = {"User": f"u_{user.pk}", "Tenant": "acme", "Test": str(test).lower()}
                with http.httpx_client() as client:
                    assert seen(client.get("/").json()) == expected
                assert seen(asyncio.run(posted_async("/"))) == expected
        with http.httpx_client(act_for=None) as client, pytest.raises(SecretUnavailable, match="per_user"):
            client.get("/")
