"""The properties of the container image that can be tested without a container engine."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from keyproxy.config import loader
from keyproxy.config.schema import Settings
from tests.acceptance.conftest import ROOT, STUCK_SECONDS, Configure

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
IMAGE = DOCKERFILE.rpartition("\nFROM ")[2]
IMAGE_DEFAULTS = ROOT / "container.toml"

#: Executes the program in its arguments with every file system read-only.
READ_ONLY = """
set -e
cut -d' ' -f5 /proc/self/mountinfo | while read -r mounted; do
    case "$mounted" in /proc*|/sys*|/dev*) ;; *) mount -o remount,bind,ro "$mounted" 2>/dev/null || true ;; esac
done
mount --bind /dev/shm /dev/shm
mount -o remount,bind,ro /dev/shm
for directory in / /tmp /var/tmp /dev/shm "$HOME" "$PWD"; do
    if touch "$directory/keyproxy-writable" 2>/dev/null; then exit 99; fi
done
exec "$@"
"""


def can_be_read_only() -> bool:
    """Whether this user may make a mount namespace."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "sh", "-c", READ_ONLY, "sh", "true"], check=False).returncode == 0


# -- the image


def instructions(name: str) -> list[str]:
    return re.findall(rf"(?m)^{name} +(.*)$", IMAGE)


def test_no_variable_of_the_image_beats_a_mounted_file() -> None:
    variables = re.findall(r"\b([A-Z_]+)=", " ".join(instructions("ENV")))
    assert {name for name in variables if name.startswith("KEYPROXY_")} == {"KEYPROXY_DEFAULTS"}


def test_the_image_runs_as_one_numeric_user_and_group() -> None:
    (user,) = instructions("USER")
    uid, gid = user.split(":")
    assert uid == gid
    assert f"groupadd --system --gid {gid} keyproxy" in IMAGE
    assert f"useradd --system --uid {uid} --gid {gid} " in IMAGE


def test_the_image_has_an_init_and_a_health_check_for_every_command() -> None:
    assert instructions("ENTRYPOINT") == ['["/usr/bin/tini", "-s", "--", "keyproxy"]']
    assert re.search(r"apt-get install -y --no-install-recommends tini\b", IMAGE)
    (check,) = instructions("HEALTHCHECK")
    assert check.endswith('CMD ["keyproxy", "health"]')


def test_probes_reach_the_ops_listener_of_the_image_from_outside() -> None:
    settings = loader.load(None, {"KEYPROXY_DEFAULTS": str(IMAGE_DEFAULTS)}).settings
    ports = {address.rpartition(":")[2] for address in (settings.listen.address, settings.ops.address)}
    assert settings.ops.address.startswith("0.0.0.0:")
    assert ports == set(" ".join(instructions("EXPOSE")).split())
    assert settings.admin == Settings().admin
    assert "COPY container.toml /opt/keyproxy/container.toml" in DOCKERFILE
    assert "KEYPROXY_DEFAULTS=/opt/keyproxy/container.toml" in " ".join(instructions("ENV"))


def test_a_mounted_file_and_the_environment_override_the_image_s_defaults(tmp_path: Path) -> None:
    mounted = tmp_path / "keyproxy.toml"
    mounted.write_text('[listen]\naddress = "0.0.0.0:80"\n[ops]\naddress = "127.0.0.1:9090"\n', encoding="utf-8")
    environment = {"KEYPROXY_DEFAULTS": str(IMAGE_DEFAULTS)}
    loaded = loader.load(mounted, environment)
    assert (loaded.settings.listen.address, loaded.settings.ops.address) == ("0.0.0.0:80", "127.0.0.1:9090")
    loaded = loader.load(mounted, environment | {"KEYPROXY_LISTEN__ADDRESS": "[::]:81"})
    assert (loaded.settings.listen.address, loaded.settings.ops.address) == ("[::]:81", "127.0.0.1:9090")
    loaded = loader.load(None, environment)
    assert loaded.origins["listen.address"].source == str(IMAGE_DEFAULTS)


def test_a_secret_s_file_is_over_the_secret_of_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "dsn").write_text("postgresql://h/from-file\n", encoding="utf-8")
    (tmp_path / "defaults.toml").write_text('[store]\ndsn = "postgresql://h/default"\n', encoding="utf-8")
    (tmp_path / "mounted.toml").write_text(f'[store]\ndsn_file = "{tmp_path}/dsn"\n', encoding="utf-8")
    loaded = loader.load(tmp_path / "mounted.toml", {"KEYPROXY_DEFAULTS": str(tmp_path / "defaults.toml")})
    assert loaded.settings.store.dsn == "postgresql://h/from-file"


def test_defaults_are_checked_like_any_configuration(tmp_path: Path) -> None:
    (tmp_path / "defaults.toml").write_text("[listen]\nport = 1\n", encoding="utf-8")
    with pytest.raises(loader.ConfigError, match=r"listen\.port: no such key \(set in .*defaults\.toml\)"):
        loader.load(None, {"KEYPROXY_DEFAULTS": str(tmp_path / "defaults.toml")})
    with pytest.raises(loader.ConfigError, match="cannot be read"):
        loader.load(None, {"KEYPROXY_DEFAULTS": str(tmp_path / "nothing.toml")})


# -- the pinned requirements


@pytest.mark.parametrize(("pinned", "hashed"), [("base", "container"), ("compile", "container-build")])
def test_the_container_s_requirements_are_the_pinned_ones_with_hashes(pinned: str, hashed: str) -> None:
    wanted = pins((ROOT / "requirements" / f"{pinned}.txt").read_text(encoding="utf-8"))
    if pinned == "compile":
        wanted |= pins((ROOT / "requirements" / "base.txt").read_text(encoding="utf-8"))
    content = (ROOT / "requirements" / f"{hashed}.txt").read_text(encoding="utf-8")
    assert pins(content) == wanted
    for requirement in re.split(r"(?m)^(?=[a-z])", content.replace("\\\n", " "))[1:]:
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", requirement)
        assert len(hashes) == len(set(hashes)) >= 1, requirement
    assert "://" not in content
    assert f"--require-hashes -r requirements/{hashed}.txt" in DOCKERFILE


def pins(text: str) -> set[str]:
    return set(re.findall(r"(?m)^([a-z0-9-]+==[^\s\\]+)", text))


# -- a read-only file system


@pytest.mark.parametrize("workers", [1, 2])
async def test_it_serves_on_a_read_only_file_system(configure: Configure, dsn: str, workers: int) -> None:
    if not can_be_read_only():
        pytest.skip("no mount namespace can be made here")
    site = configure(dsn, listen={"workers": workers})
    secret = (await site.key())["secret"]
    shown: dict[str, bytes] = {}

    async def run(*arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "unshare",
            "-rm",
            "sh",
            "-c",
            READ_ONLY,
            "sh",
            sys.executable,
            "-B",
            "-m",
            "keyproxy",
            *arguments,
            "--config",
            str(site.config),
            env=site.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    process = await run("serve")
    try:
        await site.until_ready(process)
        for _ in range(4):
            assert await site.call(secret) == (200, "")
        if workers > 1:
            assert await site.metric("keyproxy_workers", state="ready") == workers
        for command in (("health",), ("drain", "--wait")):
            other = await run(*command)
            _, err = await asyncio.wait_for(other.communicate(), STUCK_SECONDS)
            assert other.returncode == 0, err
        assert await asyncio.wait_for(process.wait(), STUCK_SECONDS) == 0
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        out, err = await asyncio.wait_for(process.communicate(), STUCK_SECONDS)
        shown["err"] = err
        assert b"Traceback" not in err
        assert out.count(b'"time"') == 4


def test_the_image_holds_the_license_that_the_package_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f'org.opencontainers.image.licenses="{project["license"]}"' in IMAGE
