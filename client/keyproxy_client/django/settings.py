"""`KEYPROXY` in Django's settings: read once, checked as a whole, unknown keys refused."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from keyproxy_client.django.checking import setting_checks as checks
from keyproxy_client.identity import Identity
from keyproxy_client.names import is_id

_REQUIRED: Final = object()


class SettingsInvalid(ImproperlyConfigured):
    """`KEYPROXY` is missing or has faults: `faults` has a sentence for each. None contains a secret."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


def _setting(default: Any, check: checks.Check, *, is_secret: bool = False) -> Any:
    """A field of Settings. A secret is never shown, neither in a fault nor by repr."""
    return dataclasses.field(default=default, repr=not is_secret, metadata={"check": check, "is_secret": is_secret})


def _dev_identity(value: Any) -> Mapping[str, Any] | None:
    """The members of a fixed identity, or None."""
    if value is None:
        return None
    members = [field.name for field in dataclasses.fields(Identity)]
    if not isinstance(value, Mapping) or "user" not in value or not set(value) <= set(members):
        raise checks.Fault(f"must be a mapping with 'user'; other members: {', '.join(members[1:])}")
    ids = [value[name] for name in ("user", "tenant", "key_id", "actor", "agent") if value.get(name) is not None]
    if not all(isinstance(one, str) and is_id(one) for one in ids) or value["user"] is None:
        raise checks.Fault("has an id that is not valid in keyproxy")
    checks.scopes(value.get("scopes", []))
    checks.boolean(value.get("is_test", False))
    return dict(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every key of `KEYPROXY`, in lower case, checked."""

    backend: str = _setting(_REQUIRED, checks.one_of("sql", "api", "off"))
    database: str = _setting("default", checks.text)
    admin_url: str = _setting("", checks.url)
    admin_token_file: str = _setting("", checks.path)
    timeout_seconds: float = _setting(2.0, checks.seconds)
    tenant: str | Callable[[Any], str] = _setting(_REQUIRED, checks.tenant)
    user_id: str | Callable[[Any], str] = _setting("u_{pk}", checks.user_id)
    provision: str | None = _setting("signup", checks.one_of("signup", "first_use", None))
    first_key: bool = _setting(False, checks.boolean)
    scopes: tuple[str, ...] = _setting((), checks.scopes)
    key_days: int = _setting(90, checks.whole(0, 36_500))
    keys_per_user_max: int = _setting(10, checks.whole(1, 10_000))
    credentials: str = _setting("service", checks.one_of("service", "per_user"))
    service_key_file: str = _setting("", checks.key_path)
    service_test_key_file: str = _setting("", checks.key_path)
    secret_keys: tuple[str, ...] = _setting((), checks.texts, is_secret=True)
    secret_keys_file: str = _setting("", checks.path)
    origin: str = _setting("", checks.origin)
    trust: str | None = _setting(None, checks.one_of("unix", "loopback", "signed", None))
    trust_networks: tuple[str, ...] = _setting(("127.0.0.0/8", "::1/128"), checks.networks)
    jwks_url: str = _setting("", checks.url)
    issuer: str = _setting("keyproxy", checks.text)
    audience: str = _setting("upstream", checks.text)
    header_prefix: str = _setting("X-Keyproxy-", checks.header_prefix)
    key_prefix: str = _setting("kp", checks.key_prefix)
    has_api_key_fallback: Any = _setting(None, checks.dotted_path)
    dev_identity: Mapping[str, Any] | None = _setting(None, _dev_identity)

    @property
    def issues_first_key(self) -> bool:
        """Whether a new user receives a live key: per-user credentials need one."""
        return self.first_key or self.credentials == "per_user"

    @property
    def fixed_tenant(self) -> str | None:
        """The tenant of all users; None if a function of the user gives it."""
        return self.tenant if isinstance(self.tenant, str) and not checks.is_dotted_path(self.tenant) else None

    def read_secret_keys(self) -> tuple[str, ...]:
        """The Fernet keys, the one that encrypts first: of the list, then the lines of the file. Raises OSError."""
        if not self.secret_keys_file:
            return self.secret_keys
        lines = Path(self.secret_keys_file).read_text(encoding="ascii").split()
        return (*self.secret_keys, *lines)


#: The names of all keys.
KEYS: Final = tuple(field.name.upper() for field in dataclasses.fields(Settings))


def read(values: object) -> Settings:
    """The settings of these values of `KEYPROXY`. Raises SettingsInvalid."""
    if not isinstance(values, Mapping):
        raise SettingsInvalid(["KEYPROXY must be a dict with at least 'BACKEND' and 'TENANT'"])
    faults = [_unknown(key) for key in values if key not in KEYS]
    read_values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        key = field.name.upper()
        if key not in values:
            if field.default is _REQUIRED:
                faults.append(f"KEYPROXY[{key!r}] is missing")
            continue
        try:
            read_values[field.name] = field.metadata["check"](values[key])
        except checks.Fault as error:
            is_shown = not field.metadata["is_secret"] and not key.endswith("_URL") and key != "ORIGIN"
            faults.append(f"KEYPROXY[{key!r}] {error}" + (f"; it is {values[key]!r}" if is_shown else ""))
    if faults:
        raise SettingsInvalid(faults)
    found = Settings(**read_values)
    faults = list(_contradictions(found))
    if faults:
        raise SettingsInvalid(faults)
    return found


def _unknown(key: object) -> str:
    closest = difflib.get_close_matches(str(key).upper(), KEYS, n=1, cutoff=0)[0]
    return f"KEYPROXY has the unknown key {key!r}; the closest key is {closest!r}"


def _contradictions(found: Settings) -> Iterator[str]:
    """Settings that others make necessary."""
    if found.backend == "api":
        for key in ("ADMIN_URL", "ADMIN_TOKEN_FILE"):
            if not getattr(found, key.lower()):
                yield f"KEYPROXY[{key!r}] is missing: BACKEND 'api' needs it"
    if found.trust == "signed" and not found.jwks_url:
        yield "KEYPROXY['JWKS_URL'] is missing: TRUST 'signed' needs it"
    if found.dev_identity is not None and "tenant" not in found.dev_identity and not found.fixed_tenant:
        yield "KEYPROXY['DEV_IDENTITY'] must have 'tenant': TENANT is a function"


@functools.lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this project. Raises SettingsInvalid."""
    values = getattr(django_settings, "KEYPROXY", None)
    if values is None:
        raise SettingsInvalid(["KEYPROXY is missing from Django's settings"])
    return read(values)


def _reset(*, setting: str, **_kwargs: object) -> None:
    """Tests change settings."""
    if setting == "KEYPROXY":
        settings.cache_clear()


setting_changed.connect(_reset, dispatch_uid="keyproxy_client.django.settings")
