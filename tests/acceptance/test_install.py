"""The installed package: the wheel's contents, and that it works outside of the checkout."""

from __future__ import annotations

import ast
import asyncio
import email
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from keyproxy import cli
from tests.acceptance.conftest import ROOT, Output, clean_environment

EXAMPLE = (ROOT / "config.example.toml").read_text(encoding="utf-8")


CLIENT = ROOT / "client"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout."""
    names = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "config.example.toml", "keyproxy"]
    return _built([ROOT / name for name in names], tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def client_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the client in this checkout."""
    names = ["pyproject.toml", "README.md", "LICENSE", "keyproxy_client"]
    return _built([CLIENT / name for name in names], tmp_path_factory.mktemp("client"))


def _built(files: Sequence[Path], directory: Path) -> Path:
    """The wheel of a copy, because a build leaves files behind."""
    source = directory / "source"
    subprocess.run(["cp", "-R", *map(str, files), str(_made(source))], check=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "--wheel-dir",
            str(directory),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    (made,) = directory.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The wheel installed in an environment."""
    target = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def _made(path: Path) -> Path:
    path.mkdir()
    return path


async def run(installed: Path, cwd: Path, *arguments: str) -> Output:
    """A command of the installed package, from another directory."""
    environment = clean_environment(cwd) | {"PYTHONPATH": str(installed)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "keyproxy",
        *arguments,
        env=environment,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    return Output(process.returncode or 0, out.decode(), err.decode())


def test_the_printed_example_is_the_file_in_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "example"]) == 0
    assert capsys.readouterr().out == EXAMPLE


async def test_a_wheel_works_outside_of_the_checkout(installed: Path, tmp_path: Path, dsn: str) -> None:
    where = await run(installed, tmp_path, "config", "example")
    assert (where.status, where.out) == (0, EXAMPLE)
    (tmp_path / "keyproxy.toml").write_text(where.out, encoding="utf-8")
    assert (await run(installed, tmp_path, "config", "check", "--config", "keyproxy.toml")).status == 0
    (tmp_path / "own.toml").write_text(f'[store]\ndsn = "{dsn}"\n', encoding="utf-8")
    for command in (("migrate",), ("tenant", "create", "acme"), ("user", "create", "u_1", "--tenant", "acme")):
        output = await run(installed, tmp_path, *command, "--config", "own.toml")
        assert output.status == 0, output.err
    assert "kp_live_" in output.out


@pytest.mark.parametrize("name", ["wheel", "client_wheel"])
def test_a_wheel_holds_every_file_of_its_package_and_nothing_else(name: str, request: pytest.FixtureRequest) -> None:
    with zipfile.ZipFile(request.getfixturevalue(name)) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    home, package = (ROOT, "keyproxy") if name == "wheel" else (CLIENT, "keyproxy_client")
    there = {
        str(path.relative_to(home))
        for path in (home / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert held == there


@pytest.mark.parametrize("name", ["wheel", "client_wheel"])
def test_a_wheel_names_its_author_and_license(name: str, request: pytest.FixtureRequest) -> None:
    with zipfile.ZipFile(request.getfixturevalue(name)) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        (license_file,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        result = email.message_from_string(archive.read(metadata).decode())
        text = archive.read(license_file).decode()
    assert result["License-Expression"] == "Apache-2.0"
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    # The project has no public address: an invented one would belong to a third party.
    assert result.get_all("Project-URL") == ["License, https://www.apache.org/licenses/LICENSE-2.0"]
    assert result["Author"]
    assert result["Description-Content-Type"] == "text/markdown"
    if name == "client_wheel":
        # Everything that it requires belongs to an extra, and nothing but bounds of versions is in one.
        assert all("extra ==" in line for line in result.get_all("Requires-Dist", []))


def test_the_client_installs_and_imports_where_nothing_else_is_installed(client_wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", str(client_wheel)], check=True, capture_output=True)
    modules = ("acting", "asgi", "http", "identity", "keys", "wsgi")
    code = f"""
import importlib.util, sys
import keyproxy_client
assert importlib.util.find_spec("keyproxy") is None
for name in {modules}:
    assert getattr(keyproxy_client, name).__name__ == "keyproxy_client." + name
foreign = {{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names
print(sorted(foreign - {{"__main__", "keyproxy_client"}}))
"""
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("home", [ROOT, CLIENT], ids=["keyproxy", "keyproxy_client"])
def test_versions_agree(home: Path) -> None:
    project = tomllib.loads((home / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = home / project["name"].replace("-", "_") / "__init__.py"
    named = [
        ast.literal_eval(node.value)
        for node in ast.parse(package.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert named == [project["version"]]


def test_the_packaged_example_is_the_one_at_the_top_of_the_repository() -> None:
    packaged = ROOT / "keyproxy" / "config.example.toml"
    assert packaged.read_text(encoding="utf-8") == EXAMPLE
    assert os.path.realpath(packaged) == os.path.realpath(ROOT / "config.example.toml")
