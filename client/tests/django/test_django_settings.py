"""`KEYPROXY`: which values are accepted, and what a fault reports."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from keyproxy_client.django.settings import KEYS, SettingsInvalid, read, settings

LEAST: dict[str, Any] = {"BACKEND": "off", "TENANT": "acme"}


def faults(**changes: Any) -> list[str]:
    with pytest.raises(SettingsInvalid) as caught:
        read({**LEAST, **changes})
    return caught.value.faults


def test_two_settings_suffice_and_the_others_have_their_defaults() -> None:
    found = dataclasses.asdict(read(LEAST))
    assert found == {
        "backend": "off",
        "database": "default",
        "admin_url": "",
        "admin_token_file": "",
        "timeout_seconds": 2.0,
        "tenant": "acme",
        "user_id": "u_{pk}",
        "provision": "signup",
        "first_key": False,
        "scopes": (),
        "key_days": 90,
        "keys_per_user_max": 10,
        "credentials": "service",
        "service_key_file": "",
        "service_test_key_file": "",
        "secret_keys": (),
        "secret_keys_file": "",
        "origin": "",
        "trust": None,
        "trust_networks": ("127.0.0.0/8", "::1/128"),
        "jwks_url": "",
        "issuer": "keyproxy",
        "audience": "upstream",
        "header_prefix": "X-Keyproxy-",
        "key_prefix": "kp",
        "has_api_key_fallback": None,
        "dev_identity": None,
    }
    assert set(KEYS) == {name.upper() for name in found}


@pytest.mark.parametrize(
    ("given", "closest"),
    [
        ("TENNANT", "TENANT"),
        ("tenant", "TENANT"),
        ("ORIGINS", "ORIGIN"),
        ("SERVICE_KEY", "SERVICE_KEY_FILE"),
        ("JWKS", "JWKS_URL"),
        ("TRUSTED_NETWORKS", "TRUST_NETWORKS"),
    ],
)
def test_an_unknown_key_names_the_closest_key(given: str, closest: str) -> None:
    assert faults(**{given: "x"}) == [f"KEYPROXY has the unknown key {given!r}; the closest key is {closest!r}"]


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(SettingsInvalid) as caught:
        read({"TRUST": "all", "KEY_DAYS": -1, "SCOPE": []})
    assert [fault.split("'")[1] for fault in caught.value.faults] == ["SCOPE", "BACKEND", "TENANT", "KEY_DAYS", "TRUST"]


@pytest.mark.parametrize("value", [None, [], "acme", 3])
def test_keyproxy_that_is_no_dict_is_a_fault(value: object) -> None:
    with pytest.raises(SettingsInvalid, match="KEYPROXY"):
        read(value)
    with override_settings(KEYPROXY=value), pytest.raises(SettingsInvalid, match="KEYPROXY"):
        settings()


REFUSED: list[tuple[str, Any]] = [
    ("BACKEND", "SQL"), ("BACKEND", None), ("DATABASE", ""), ("ADMIN_URL", "127.0.0.1:9443"),
    ("ADMIN_URL", "https://a:b@host"), ("ADMIN_URL", "https://host/?q"), ("ADMIN_URL", "ftp://host"),
    ("ADMIN_URL", "http://[::1"), ("TIMEOUT_SECONDS", 0), ("TIMEOUT_SECONDS", 61), ("TIMEOUT_SECONDS", "2"),
    ("TIMEOUT_SECONDS", True), ("TIMEOUT_SECONDS", float("nan")), ("TENANT", ""), ("TENANT", "a b"), ("TENANT", None),
    ("TENANT", "x" * 129), ("USER_ID", ""), ("USER_ID", "user"), ("USER_ID", "u_{}"), ("USER_ID", "u_{0}"),
    ("USER_ID", "u_{pk"), ("USER_ID", "u_{pk!r}"), ("USER_ID", "u_{pk:>8}"), ("USER_ID", "{profile.code}"),
    ("USER_ID", "{_state}"), ("USER_ID", "{groups[0]}"), ("USER_ID", 3), ("PROVISION", "sign-up"), ("PROVISION", False),
    ("FIRST_KEY", "false"), ("FIRST_KEY", 1), ("SCOPES", "jobs:write"), ("SCOPES", ["jobs write"]), ("SCOPES", [1]),
    ("KEY_DAYS", -1), ("KEY_DAYS", 36_501), ("KEY_DAYS", 1.5), ("KEY_DAYS", True), ("KEYS_PER_USER_MAX", 0),
    ("CREDENTIALS", "user"), ("SERVICE_KEY_FILE", 3), ("SERVICE_KEY_FILE", "/run/{user}"), ("SERVICE_KEY_FILE", "/a\0"),
    ("SERVICE_TEST_KEY_FILE", "/run/{tenant"), ("SERVICE_KEY_FILE", b"/run/key"), ("SECRET_KEYS", "k"),
    ("SECRET_KEYS", [""]), ("SECRET_KEYS_FILE", None), ("ORIGIN", "http://host/path"), ("ORIGIN", "host:80"),
    ("ORIGIN", "http://host:0"), ("TRUST", "all"), ("TRUST", "ALL"), ("TRUST", True), ("TRUST", ["loopback"]),
    ("TRUST_NETWORKS", []), ("TRUST_NETWORKS", "127.0.0.0/8"), ("TRUST_NETWORKS", ["localhost"]),
    ("TRUST_NETWORKS", ["10.0.0.1/8"]), ("TRUST_NETWORKS", ["0.0.0.0/0"]), ("TRUST_NETWORKS", ["::/0"]),
    ("TRUST_NETWORKS", ["0.0.0.0/1", "128.0.0.0/1"]), ("JWKS_URL", "jwks.json"), ("ISSUER", ""), ("AUDIENCE", None),
    ("HEADER_PREFIX", "Keyproxy-"), ("HEADER_PREFIX", "X-Forwarded-"), ("HEADER_PREFIX", "X-"), ("KEY_PREFIX", "KP"),
    ("KEY_PREFIX", ""), ("HAS_API_KEY_FALLBACK", "HasAPIKey"), ("HAS_API_KEY_FALLBACK", True), ("DEV_IDENTITY", {}),
    ("DEV_IDENTITY", "u_1"), ("DEV_IDENTITY", {"user": "a b"}), ("DEV_IDENTITY", {"user": "u", "admin": True}),
    ("DEV_IDENTITY", {"user": "u", "scopes": "all"}), ("DEV_IDENTITY", {"user": "u", "is_test": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda part: repr(part)[:30])
def test_an_invalid_value_is_one_fault_that_names_its_key(key: str, value: Any) -> None:
    (fault,) = faults(**{key: value})
    assert fault.startswith(f"KEYPROXY[{key!r}] ")


ACCEPTED: list[tuple[str, Any, Any]] = [
    ("ADMIN_URL", "https://host:9443/", "https://host:9443"), ("TIMEOUT_SECONDS", 1, 1.0), ("TENANT", "a:eu", "a:eu"),
    ("TENANT", "accounts.tenants.of", "accounts.tenants.of"), ("USER_ID", "{uuid}", "{uuid}"), ("PROVISION", None, None),
    ("USER_ID", "accounts.ids.of", "accounts.ids.of"), ("SCOPES", ["b", "a", "b"], ("b", "a")), ("KEY_DAYS", 0, 0),
    ("SERVICE_KEY_FILE", Path("/run/{tenant}/key"), "/run/{tenant}/key"), ("ORIGIN", "http://h:1/", "http://h:1"),
    ("TRUST_NETWORKS", ["10.0.0.0/8"], ("10.0.0.0/8",)), ("HEADER_PREFIX", "X-A-", "X-A-"), ("KEY_PREFIX", "a", "a"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "found"), ACCEPTED, ids=lambda part: repr(part)[:30])
def test_a_valid_value_is_accepted(key: str, value: Any, found: Any) -> None:
    assert getattr(read({**LEAST, key: value}), key.lower()) == found


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"BACKEND": "api", "ADMIN_TOKEN_FILE": "/t"}, "ADMIN_URL"),
        ({"BACKEND": "api", "ADMIN_URL": "http://h"}, "ADMIN_TOKEN_FILE"),
        ({"TRUST": "signed"}, "JWKS_URL"),
        ({"TENANT": "a.b", "DEV_IDENTITY": {"user": "u_1"}}, "DEV_IDENTITY"),
    ],
)
def test_a_setting_that_another_one_needs_is_named(changes: dict[str, Any], missing: str) -> None:
    (fault,) = faults(**changes)
    assert fault.startswith(f"KEYPROXY[{missing!r}]")


def test_no_fault_and_no_repr_shows_a_secret() -> None:
    assert "hunter2" not in str(faults(SECRET_KEYS="hunter2") + faults(ADMIN_URL="http://u:hunter2@host"))
    assert "hunter2" not in str(faults(ORIGIN="http://u:hunter2@host"))
    assert "hunter2" not in repr(read({**LEAST, "SECRET_KEYS": ["hunter2"]}))


def test_secret_keys_of_the_list_come_before_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("second\nthird\n", encoding="ascii")
    found = read({**LEAST, "SECRET_KEYS": ["first"], "SECRET_KEYS_FILE": file})
    assert found.read_secret_keys() == ("first", "second", "third")


def test_settings_are_read_once_and_again_after_a_change() -> None:
    with override_settings(KEYPROXY=LEAST):
        assert settings() is settings()
        with override_settings(KEYPROXY={**LEAST, "TENANT": "globex"}):
            assert settings().tenant == "globex"
        assert settings().tenant == "acme"


@pytest.mark.once
def test_documentation_lists_every_setting_with_its_default() -> None:
    page = (Path(__file__).parents[3] / "docs" / "django.md").read_text(encoding="utf-8")
    table = page.partition("| key | default | meaning |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    listed = {
        key.strip(" `"): default.strip()
        for keys, defaults in rows
        for key, default in zip(keys.split(", "), _defaults(defaults, len(keys.split(", "))), strict=True)
    }
    assert set(listed) == set(KEYS)
    found = read({"BACKEND": "off", "TENANT": "acme"})
    for key, default in listed.items():
        if not default.startswith("required"):
            value = ast.literal_eval(default.strip("`"))
            assert getattr(found, key.lower()) == (tuple(value) if isinstance(value, list) else value), key


def _defaults(cell: str, count: int) -> list[str]:
    """The defaults of a row of one or several keys, which may share one."""
    single = cell.strip()
    parts = single.split("`, `")
    return parts if len(parts) == count else [single] * count
