"""Secret files of one process, and the choice among their secrets: with real files, and a clock that tests set."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from keyproxy.config.schema import Settings
from keyproxy.config.tools.provider_settings import ProviderRow, SecretSettings
from keyproxy.model import Moment
from keyproxy.ports.tools import UpstreamCredential, UpstreamCredentials
from keyproxy.process.providers.provider_credentials import Provider, ProviderCredentials
from keyproxy.process.providers.proxy_providers import ProxyProviders, file_problems
from keyproxy.process.providers.secret_file import SecretFile
from keyproxy.process.providers.watched_file import WatchedFile, WatchedFileError, examine_all
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.provider_keys.credential_header import CredentialHeader, hint, read_secret

HEADER = CredentialHeader("openai", "Authorization", "Bearer {secret}")
DAY = 24 * 3600.0


def secret_of(credential: UpstreamCredential | None) -> str:
    """The secret in a credential."""
    assert credential is not None
    return credential.line.decode().removeprefix("Authorization: Bearer ").removesuffix("\r\n")


def settle(file: SecretFile) -> None:
    """Examine a file, as the watch does."""
    sighting = file.file.examine()
    if sighting is not None:
        file.file.settle(sighting)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with one secret."""
    path = tmp_path / "secret"
    path.write_text("one\n")
    return path


@pytest.fixture
def file(path: Path) -> SecretFile:
    """The secrets of that file."""
    file = SecretFile(str(path), "providers[1].secret_file", HEADER)
    file.file.load()
    return file


# -- files


def test_previous_secret_is_used_for_a_day_while_the_newest_is_marked(
    file: SecretFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyproxy.platform.clock.monotonic", lambda: 1000.0)
    path.write_text("two")
    settle(file)
    assert secret_of(file.credential(1000.0)) == "two"
    newest = file.credential(1000.0)
    assert newest is not None
    newest.refused_until_mono_seconds = 1060.0
    before = file.credential(1001.0)
    assert secret_of(before) == "one"
    assert secret_of(file.credential(1060.0)) == "two"
    assert before is not None
    before.refused_until_mono_seconds = 1060.0
    assert file.credential(1001.0) is newest  # both are marked: the newest
    before.refused_until_mono_seconds = 0.0
    newest.refused_until_mono_seconds = 1000.0 + 2 * DAY
    assert secret_of(file.credential(999.0 + DAY)) == "one"
    assert secret_of(file.credential(1000.0 + DAY)) == "two"


def test_same_content_again_is_no_new_secret(file: SecretFile, path: Path) -> None:
    first = file.credential(0.0)
    path.write_text(" one \n\n")
    settle(file)
    assert file.credential(0.0) is first


def test_change_within_the_granularity_of_file_times_is_seen(file: SecretFile, path: Path) -> None:
    times = path.stat()
    for content in ("two", "six", "ten"):
        path.write_text(content)  # in place, of the same size
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        settle(file)
        assert secret_of(file.credential(0.0)) == content


@pytest.mark.parametrize("content", [b"", b" \n", b"two\nlines", b"nul\0", b"\xff", b"x" * 8193])
def test_invalid_content_is_logged_once_without_quoting_it(
    file: SecretFile, path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        path.write_bytes(content)
        settle(file)
    assert secret_of(file.credential(0.0)) == "one"
    assert caplog.text.count("the last good content stays in use") == 1
    assert "lines" not in caplog.text
    path.write_text("two")
    settle(file)
    assert secret_of(file.credential(0.0)) == "two"


def test_each_invalid_content_is_logged(file: SecretFile, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in ("a\nb", "a\nc"):
        path.write_text(content)
        for _ in range(2):
            settle(file)
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 2


def test_named_pipe_in_place_of_a_file_does_not_stop_the_watch(file: SecretFile, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    settle(file)
    assert secret_of(file.credential(0.0)) == "one"
    with pytest.raises(WatchedFileError, match="not a regular file"):
        SecretFile(str(path), "providers[1].secret_file", HEADER).file.load()
    path.unlink()
    path.write_text("two")
    settle(file)
    assert secret_of(file.credential(0.0)) == "two"


async def test_watch_follows_links_that_are_switched(tmp_path: Path) -> None:
    # As Kubernetes updates a mounted secret.
    for name, content in (("v1", "one"), ("v2", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(content)
    data = tmp_path / "data"
    data.symlink_to("v1")
    providers = ProxyProviders()
    settings = Settings(providers=(ProviderRow("openai", secret_file=str(data / "key")),))
    providers.prepare(settings)
    chooser = providers.credentials(settings, NoStore())  # type: ignore[arg-type]
    assert secret_of(choose(chooser)) == "one"
    other = tmp_path / "other"
    other.symlink_to("v2")
    other.rename(data)
    await providers.look()
    assert secret_of(choose(chooser)) == "two"


async def test_file_that_is_being_written_in_place_is_used_once_it_is_complete(path: Path) -> None:
    providers = ProxyProviders()
    settings = Settings(providers=(ProviderRow("openai", secret_file=str(path)),))
    providers.prepare(settings)
    chooser = providers.credentials(settings, NoStore())  # type: ignore[arg-type]
    content = "two" * 40
    used = set()
    with path.open("w") as writing:
        for part in range(0, len(content), 12):
            looking = asyncio.create_task(providers.look())
            await asyncio.sleep(0.05)
            writing.write(content[part : part + 12])
            writing.flush()
            await looking
            used.add(secret_of(choose(chooser)))
            if part == 36:
                break
        assert used == {"one"}
        writing.write(content[48:])
    await providers.look()
    newest = choose(chooser)
    assert secret_of(newest) == content
    # The secret before is the last complete one.
    newest.was_refused(0.0)
    assert secret_of(choose(chooser)) == "one"


async def test_file_that_never_stops_changing_is_used_after_some_examinations(path: Path) -> None:
    one = WatchedFile(str(path), "a file", lambda _content, _modified: None)
    one.load()
    outcomes = []
    for number in range(5):
        path.write_text(f"{number}")
        examining = asyncio.create_task(asyncio.to_thread(examine_all, [one]))
        await asyncio.sleep(0.1)
        path.write_text(f"{number}+")
        outcomes += await examining
    assert outcomes[:4] == [None] * 4
    assert outcomes[4] is not None
    assert outcomes[4].content == b"4+"


def test_every_unusable_file_is_reported(tmp_path: Path, path: Path) -> None:
    (tmp_path / "keys").write_text("bad")
    settings = Settings(
        providers=(
            ProviderRow("a", secret_file=str(path)),
            ProviderRow("b", test_secret_file=str(tmp_path / "missing")),
            ProviderRow("c", header="No Name", secret_file=str(path)),
        ),
        secrets=SecretSettings(str(tmp_path / "keys")),
    )
    problems = file_problems(settings)
    assert len(problems) == 3
    for found, begins in zip(
        problems, ("providers[2].test_secret_file", "providers[3]", "secrets.key_file"), strict=True
    ):
        assert found.startswith(begins)
    with pytest.raises(WatchedFileError):
        ProxyProviders().prepare(settings)


# -- the choice


class NoStore:
    """A store with these rows, by tenant and mode. `unusable`: those for which no row is usable."""

    def __init__(self, *, rows: dict[tuple[str, bool], UpstreamCredential] | None = None) -> None:
        self.rows = rows or {}
        self.unusable: set[tuple[str, bool]] = set()

    def configure(self, *_: object) -> None:
        """Nothing to open."""

    def find(self, _provider: str, tenant_id: str, _now: Moment, *, is_test: bool) -> UpstreamCredential | None:
        """See StoredCredentials."""
        if (tenant_id, is_test) in self.unusable:
            raise Refusal(Reason.UPSTREAM_CREDENTIAL_UNAVAILABLE)
        return self.rows.get((tenant_id, is_test))

    def since_wall(self, _provider: str) -> float:
        """See StoredCredentials."""
        return 100.0


def choose(chooser: UpstreamCredentials, *, is_test: bool = False) -> UpstreamCredential:
    """The credential of a request of acme."""
    return chooser.choose("openai", "acme", Moment(0.0, 0.0), is_test=is_test)


def chooser(
    tmp_path: Path, store: NoStore, *, live: bool, test: bool, is_stored: bool, lends_live: bool
) -> ProviderCredentials:
    """The choice over files with the secrets `live` and `test`, and a store."""
    files: dict[str, SecretFile] = {}
    for name, wanted in (("live", live), ("test", test)):
        if wanted:
            (tmp_path / name).write_text(name)
            one = SecretFile(str(tmp_path / name), name, HEADER)
            one.file.load()
            files[name] = one
    provider = Provider(is_stored=is_stored, live_file=files.get("live"), test_file=files.get("test"))
    return ProviderCredentials({"openai": provider}, store, lends_live=lends_live, failures={})


@pytest.mark.parametrize(
    ("has_live", "has_test", "lends_live", "live_gets", "test_gets"),
    [
        (True, True, False, "live", "test"),
        (True, True, True, "live", "test"),
        (True, False, False, "live", None),
        (True, False, True, "live", "live"),
        (False, True, True, None, "test"),
        (False, False, True, None, None),
    ],
)
def test_test_requests_use_live_secrets_only_without_an_upstream_for_tests(
    tmp_path: Path, has_live: bool, has_test: bool, lends_live: bool, live_gets: str | None, test_gets: str | None
) -> None:
    one = chooser(tmp_path, NoStore(), live=has_live, test=has_test, is_stored=False, lends_live=lends_live)
    for is_test, wanted in ((False, live_gets), (True, test_gets)):
        if wanted is None:
            with pytest.raises(Refusal) as refused:
                choose(one, is_test=is_test)
            assert refused.value.reason is Reason.UPSTREAM_CREDENTIAL_UNAVAILABLE
        else:
            assert secret_of(choose(one, is_test=is_test)) == wanted


def test_stored_secret_comes_before_the_file_and_an_unusable_one_excludes_it(tmp_path: Path) -> None:
    store = NoStore(rows={("acme", False): HEADER.credential(b"stored")})
    one = chooser(tmp_path, store, live=True, test=False, is_stored=True, lends_live=True)
    assert secret_of(choose(one)) == "stored"
    assert secret_of(choose(one, is_test=True)) == "stored"
    store.unusable.add(("acme", True))
    with pytest.raises(Refusal):
        choose(one, is_test=True)
    store.unusable = {("acme", False)}
    with pytest.raises(Refusal):
        choose(one)
    store.unusable, store.rows = set(), {}
    assert secret_of(choose(one)) == "live"


def test_refused_credential_is_marked_for_a_minute_and_counted(tmp_path: Path) -> None:
    failures: dict[str, int] = {}
    one = ProviderCredentials({}, NoStore(), lends_live=True, failures=failures)
    credential = HEADER.credential(b"one")
    one.was_refused(credential, 100.0)
    assert credential.refused_until_mono_seconds == 160.0
    one.was_refused(credential, 101.0)
    assert failures == {"openai": 2}


def test_older_credential_is_tried_by_one_request_at_a_time_until_the_upstream_accepts_it(
    file: SecretFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyproxy.platform.clock.monotonic", lambda: 0.0)
    path.write_text("two")
    settle(file)
    newest = file.credential(0.0)
    assert newest is not None
    newest.was_refused(100.0)
    older = file.credential(100.0)
    assert older is not None
    older.note_sent(100.0)
    # All other requests are sent with the newest one: if clients provoked the 401, the older one may fail.
    assert [secret_of(file.credential(at)) for at in (100.0, 105.0, 109.9, 110.0)] == ["two", "two", "two", "one"]
    # An invalid request proves nothing, but the next one may try.
    older.note_response(404, 100.0)
    assert secret_of(file.credential(101.0)) == "one"
    older.note_sent(101.0)
    older.note_response(200, 101.0)
    older.note_sent(102.0)
    assert secret_of(file.credential(102.0)) == "one"
    # Neither do late responses to requests with the newest one.
    newest.was_refused(103.0)
    assert secret_of(file.credential(103.0)) == "one"
    older.was_refused(104.0)
    assert secret_of(file.credential(104.0)) == "two"
    # That it was accepted before another refusal does not count.
    newest.was_refused(200.0)
    older.note_sent(200.0)
    assert secret_of(file.credential(200.0)) == "two"


def test_age_is_that_of_the_oldest_secret_in_use(tmp_path: Path) -> None:
    filed = chooser(tmp_path, NoStore(), live=True, test=True, is_stored=False, lends_live=True)
    written = (tmp_path / "live").stat().st_mtime
    assert filed.ages(written + 50.0) == {"openai": pytest.approx(50.0, abs=1.0)}
    stored = chooser(tmp_path, NoStore(), live=True, test=False, is_stored=True, lends_live=True)
    assert stored.ages(10_100.0) == {"openai": 10_000.0}


# -- headers


@pytest.mark.parametrize(
    ("name", "value_format"),
    [
        ("Authorization", "Bearer"),
        ("Authorization", "{secret} {secret}"),
        ("Bad Name", "{secret}"),
        ("", "{secret}"),
        ("X-Key\r\n", "{secret}"),
        ("X-Key", "{secret}\r\nX: y"),
        ("X-Key", " {secret}"),
    ],
)
def test_header_that_could_not_be_written_is_refused(name: str, value_format: str) -> None:
    with pytest.raises(ValueError, match=r"header|format"):
        CredentialHeader("p", name, value_format)


def test_secret_is_shown_by_no_repr_and_hinted_only_if_long() -> None:
    credential = HEADER.credential(read_secret(b"canary-0123456789"))
    assert "canary" not in repr(credential) + repr(HEADER) + repr([credential])
    assert hint(b"canary-0123456789") == "6789"
    assert hint(b"short-secret") == ""


def test_numbers_of_credentials_differ() -> None:
    assert len({HEADER.credential(b"x").number for _ in range(100)}) == 100
