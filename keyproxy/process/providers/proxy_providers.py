"""The credentials of upstreams in one process: its secret files and key file, watched, and the choice among secrets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

from keyproxy.config.schema import Settings
from keyproxy.config.tools.provider_settings import ProviderRow
from keyproxy.platform import clock
from keyproxy.process.providers.provider_credentials import Provider, ProviderCredentials
from keyproxy.process.providers.secret_file import SecretFile
from keyproxy.process.providers.watched_file import WatchedFile, WatchedFileError, examine_all
from keyproxy.signing.sealing import SealingKeys
from keyproxy.store.background import BackgroundTask
from keyproxy.store.provider_keys.cache import ProviderKeyCache
from keyproxy.store.provider_keys.credential_header import CredentialHeader

#: How often the files are examined.
_LOOK_SECONDS: Final = 1.0

#: A secret file: its path, and the header that its secret is for.
_FileKey = tuple[str, CredentialHeader]


class _KeyFile:
    """The keys that open stored secrets, from one file."""

    def __init__(self, path: str) -> None:
        self.keys: SealingKeys | None = None
        self.file: Final = WatchedFile(path, "secrets.key_file", self._take)

    def _take(self, content: bytes, _modified_wall_seconds: float) -> None:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8 text") from None
        self.keys = SealingKeys.parse(text)


class ProxyProviders:
    """The providers of one process: see the module. What is known of its files outlasts a reload."""

    def __init__(self) -> None:
        self.lasting = BackgroundTask("provider_files")
        self._failures: dict[str, int] = {}
        self._files: dict[_FileKey, SecretFile] = {}
        self._key_files: dict[str, _KeyFile] = {}
        self._key_file: _KeyFile | None = None
        self._stored: ProviderKeyCache | None = None
        self._headers: dict[str, CredentialHeader] = {}
        self._credentials: ProviderCredentials | None = None

    def prepare(self, settings: Settings) -> None:
        """Read the files of a configuration that were not read before. Raises WatchedFileError."""
        for number, row in enumerate(settings.providers, start=1):
            header = _header(number, row)
            for name, path in _paths(row):
                if (path, header) not in self._files:
                    file = SecretFile(path, f"providers[{number}].{name}", header)
                    file.file.load()
                    self._files[path, header] = file
        path = settings.secrets.key_file
        if path and path not in self._key_files:
            key_file = _KeyFile(path)
            key_file.file.load()
            self._key_files[path] = key_file

    def credentials(self, settings: Settings, stored: ProviderKeyCache) -> ProviderCredentials:
        """The credentials under a configuration that was prepared. `stored`: the cache of the store in use."""
        files, providers = {}, {}
        self._headers = {}
        for number, row in enumerate(settings.providers, start=1):
            header = self._headers[row.name] = _header(number, row)
            used = {name: self._files[path, header] for name, path in _paths(row)}
            files.update({(file.file.path, header): file for file in used.values()})
            providers[row.name] = Provider(
                is_stored=row.sealed, live_file=used.get("secret_file"), test_file=used.get("test_secret_file")
            )
            self._failures.setdefault(row.name, 0)
        self._files = files
        self._key_file = self._key_files.get(settings.secrets.key_file)
        self._key_files = {} if self._key_file is None else {self._key_file.file.path: self._key_file}
        self._stored = stored
        stored.configure(None if self._key_file is None else self._key_file.keys, self._headers)
        self._credentials = ProviderCredentials(
            providers, stored, lends_live=not settings.upstream.test_url, failures=self._failures
        )
        return self._credentials

    def start(self) -> None:
        """Start examining the files."""
        self.lasting.start(self._watch)

    async def close(self) -> None:
        """Stop examining the files."""
        await self.lasting.end()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Examine all files, in a thread: the file system may be a network's."""
        watched = [file.file for file in self._files.values()]
        watched += [key_file.file for key_file in self._key_files.values()]
        if not watched:
            return
        sightings = await asyncio.to_thread(examine_all, watched)
        for file, sighting in zip(watched, sightings, strict=True):
            if sighting is not None:
                file.settle(sighting)
        mono = clock.monotonic()
        for secret_file in self._files.values():
            secret_file.forget_previous(mono)
        if self._stored is not None and self._key_file is not None:
            self._stored.configure(self._key_file.keys, self._headers)

    # -- metrics

    def failures(self) -> dict[str, float]:
        """How often upstreams have refused a credential, by provider."""
        return dict(self._failures)

    def ages(self) -> dict[str, float]:
        """The age of each provider's oldest secret in use, in seconds."""
        return {} if self._credentials is None else self._credentials.ages(clock.wall())


def _paths(row: ProviderRow) -> Iterator[tuple[str, str]]:
    """The configured files of a provider, by the name of their key."""
    for name, path in (("secret_file", row.secret_file), ("test_secret_file", row.test_secret_file)):
        if path:
            yield name, path


def _header(number: int, row: ProviderRow) -> CredentialHeader:
    try:
        return CredentialHeader(row.name, row.header, row.format)
    except ValueError as error:
        raise WatchedFileError(f"providers[{number}].{error}") from None


def file_problems(settings: Settings) -> list[str]:
    """A sentence for each file of the providers, and of their keys, that cannot be used."""
    found = []
    for number, row in enumerate(settings.providers, start=1):
        one = Settings(providers=(row,))
        try:
            ProxyProviders().prepare(one)
        except WatchedFileError as error:
            found.append(str(error).replace("providers[1]", f"providers[{number}]", 1))
    try:
        ProxyProviders().prepare(Settings(secrets=settings.secrets))
    except WatchedFileError as error:
        found.append(str(error))
    return found
