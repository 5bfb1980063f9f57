"""Where the secret of the key comes from. It is looked up for each request, so that a rotation needs no restart."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from keyproxy_client import keys
from keyproxy_client.acting import Acting

_TENANT: Final = "{tenant}"

_log = logging.getLogger("keyproxy_client")

#: Every key and agent token; never white space, which could end the header.
_SECRET = re.compile(r"[!-~]{8,4096}")

#: Whether the rest of it is well-formed is for keyproxy to decide.
_TEST_KEY = re.compile("[0-9a-z]+_test_")

#: The files of so many tenants are kept.
_FILES_MAX: Final = 1_024


class SecretUnavailable(RuntimeError):
    """There is no secret to send. Raised before anything is sent; shows the path of a file, never its content."""


@runtime_checkable
class KeySource(Protocol):
    """Finds the secret for a request. `acting` is None for requests with the key's own identity."""

    #: Whether the key is one of a service, which names the acting user in Act-For.
    delegates: bool
    #: Whether it returns a key of the acting user's mode, so that no other source is needed for test mode.
    chooses_mode: bool

    def secret(self, acting: Acting | None) -> str:
        """The secret. Raises SecretUnavailable."""
        ...

    async def secret_async(self, acting: Acting | None) -> str:
        """The same for coroutines, without blocking the event loop for long."""
        ...

    def forget(self) -> None:
        """Read again what was read, because keyproxy refused it."""
        ...


#: A secret, the path of a file (a `Path`, or text that begins with "/"), or a function of the acting user or of nothing.
Key: TypeAlias = "str | os.PathLike[str] | Callable[..., str | Awaitable[str]] | KeySource"


def source_of(key: Key, *, default_tenant: str | None = None) -> KeySource:
    """The source for a key as callers write it. Raises TypeError and ValueError."""
    if isinstance(key, os.PathLike) or (isinstance(key, str) and key.startswith("/")):
        return key_file(os.fspath(key), default_tenant)
    if isinstance(key, str):
        if "/" in key:
            raise ValueError("a key has no '/': pass the path of its file as a Path")
        return FixedKey(key)
    if isinstance(key, KeySource):
        return key
    if callable(key):
        return CalledKey(key)
    raise TypeError("a key is a secret, a path or a function")


class FixedKey:
    """A secret that does not change."""

    delegates = True
    chooses_mode = False

    def __init__(self, secret: str) -> None:
        self._secret = _required(_stripped(secret), "the key")

    def secret(self, _acting: Acting | None) -> str:
        """The secret."""
        return self._secret

    async def secret_async(self, _acting: Acting | None) -> str:
        """The secret."""
        return self._secret

    def forget(self) -> None:
        """Nothing can be read again."""


class KeyFile:
    """A file that holds a secret, read again when it changes. `{tenant}` in its path is the tenant of the acting user.

    While a file is missing or half-written, as during a replacement, the last secret is used: revoking a key, not
    deleting its file, ends its access.
    """

    delegates = True
    chooses_mode = False

    def __init__(self, template: str, default_tenant: str | None = None) -> None:
        self._template = template
        self._default_tenant = default_tenant
        self._read: dict[str, tuple[tuple[int, ...], str]] = {}
        self._unreadable: set[str] = set()

    def secret(self, acting: Acting | None) -> str:
        """The secret in the file. Raises SecretUnavailable."""
        path = self._path(acting)
        known = self._read.get(path)
        try:
            found = os.stat(path)  # noqa: PTH116 - once per request, and a Path takes five times as long
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev)
            if known is not None and known[0] == stamp:
                return known[1]
            secret = _required(_stripped(Path(path).read_text(encoding="ascii")), path)
        except (OSError, ValueError) as error:
            # The cause is not chained: a decoding error quotes the content.
            reason = error.strerror if isinstance(error, OSError) else "it does not contain exactly one key"
            if known is None:
                raise SecretUnavailable(f"no key in {path}: {reason}") from None
            if path not in self._unreadable:
                self._unreadable.add(path)
                _log.warning("no key in %s: %s; the last one is still used", path, reason)
            return known[1]
        self._unreadable.discard(path)
        if len(self._read) >= _FILES_MAX:
            self._read.clear()
        self._read[path] = (stamp, secret)
        return secret

    async def secret_async(self, acting: Acting | None) -> str:
        """The secret in the file, which is too short to block."""
        return self.secret(acting)

    def forget(self) -> None:
        """Read the files again, although they look unchanged: a file system may not resolve the time of a change."""
        # Other threads add files meanwhile.
        self._read = {path: ((), secret) for path, (_, secret) in list(self._read.items())}

    def _path(self, acting: Acting | None) -> str:
        if _TENANT not in self._template:
            return self._template
        tenant = self._default_tenant if acting is None or acting.tenant is None else acting.tenant
        if tenant is None:
            raise SecretUnavailable(
                f"the key file {self._template} needs the tenant of the acting user: acting_as(…, tenant=…)"
            )
        return self._template.replace(_TENANT, tenant)


@functools.lru_cache(maxsize=_FILES_MAX)
def key_file(template: str, default_tenant: str | None) -> KeyFile:
    """One object per file and process: a client that is made while the file is replaced has the last secret too."""
    return KeyFile(template, default_tenant)


class CalledKey:
    """A function of the acting user, or of nothing, that returns the secret; for async clients also asynchronous."""

    delegates = True

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.chooses_mode = _takes_one(function)

    def secret(self, acting: Acting | None) -> str:
        """The secret that the function returns."""
        found = self._call(acting)
        if inspect.isawaitable(found):
            if inspect.iscoroutine(found):
                found.close()
            raise TypeError("the function for the key is asynchronous, but the HTTP client is not")
        found = _stripped(found)
        return self._secret(found)

    async def secret_async(self, acting: Acting | None) -> str:
        """The secret that the function returns or, if it is asynchronous, its result."""
        found = self._call(acting)
        found = _stripped(await found if inspect.isawaitable(found) else found)
        return self._secret(found)

    def forget(self) -> None:
        """The function is called for each request."""

    @staticmethod
    def _secret(found: str | None) -> str:
        try:
            return _required(found, "the function for the key")
        except ValueError as error:
            raise SecretUnavailable(str(error)) from None

    def _call(self, acting: Acting | None) -> Any:
        return self._function(acting) if self.chooses_mode else self._function()


class KeysByMode:
    """A key for live mode and one for test mode. Without the latter, test mode needs a key that is itself a test key.

    With both, a key of the other mode is refused, such as one in the wrong file. Agent tokens do not show their mode.
    """

    def __init__(self, live: KeySource, test: KeySource | None) -> None:
        self._live = live
        self._test = test
        self.delegates = live.delegates
        self.chooses_mode = True

    def secret(self, acting: Acting | None) -> str:
        """The secret for the mode of the acting user. Raises SecretUnavailable."""
        return self._of_mode(self._source(acting).secret(acting), acting)

    async def secret_async(self, acting: Acting | None) -> str:
        """The secret for the mode of the acting user. Raises SecretUnavailable."""
        return self._of_mode(await self._source(acting).secret_async(acting), acting)

    def forget(self) -> None:
        """Read both again."""
        self._live.forget()
        if self._test is not None:
            self._test.forget()

    def _source(self, acting: Acting | None) -> KeySource:
        return self._test if acting is not None and acting.is_test and self._test is not None else self._live

    def _of_mode(self, secret: str, acting: Acting | None) -> str:
        if acting is None or (self._test is None and not acting.is_test):
            return secret
        if self._test is None:
            if _TEST_KEY.match(secret) is None:
                raise SecretUnavailable("the acting user is in test mode, and there is no test key")
            return secret
        parts = keys.parse(secret)
        if parts is not None and parts.is_test != acting.is_test:
            needed, found = ("test", "live") if acting.is_test else ("live", "test")
            raise SecretUnavailable(f"the acting user is in {needed} mode, and the {needed} key is a {found} key")
        return secret


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # a built-in without a signature
        return False
    return True


def _stripped(secret: object) -> str | None:
    """The secret without the white space around it, such as the end of a line in a file; None if it is malformed."""
    stripped = secret.strip() if isinstance(secret, str) else ""
    return stripped if _SECRET.fullmatch(stripped) is not None else None


def _required(secret: str | None, origin: str) -> str:
    """Apart from `_stripped`, because an exception keeps the local variables of its frames, and tools report them."""
    if secret is None:
        raise ValueError(f"{origin} does not give a key: expected 8 to 4096 visible ASCII characters")
    return secret
