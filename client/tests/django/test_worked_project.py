"""The steps of docs/django.md, executed as they are written there, and what the project then does."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from deployment import Deployment, clean_environment, free_port

pytestmark = pytest.mark.newest

REPOSITORY = Path(__file__).parents[3]
EXAMPLE = REPOSITORY / "client" / "examples" / "django"
PAGE = (REPOSITORY / "docs" / "django.md").read_text(encoding="utf-8")

_FENCED = re.compile(r"(?ms)^```(\w+)\n(.*?)^```$")
_STUCK_SECONDS = 120.0

#: The accounts of the existing project. Prints their keys, that of bob in test mode, and a session of bob. Without
#: passwords, whose hashes would take seconds.
_ACCOUNTS = """
from django.contrib.auth.models import User
from django.test import Client
from jobs.models import CustomAPIKey
alice, bob = (User.objects.create_user(name) for name in ("alice", "bob"))
for user, is_test in ((alice, False), (bob, True)):
    print(CustomAPIKey.objects.create_key(name=f"key of {user}", user=user, is_test=is_test)[1])
browser = Client()
browser.force_login(bob)
print(browser.cookies["sessionid"].value)
"""


@dataclass(frozen=True)
class Change:
    """The changes of one file in a block of the page."""

    path: str
    hunks: list[tuple[str, str]]

    def apply(self, project: Path, *, reverse: bool = False) -> None:
        """Replace each hunk, which must match exactly once."""
        file = project / self.path
        text = file.read_text(encoding="utf-8")
        for old, new in self.hunks:
            before, after = (new, old) if reverse else (old, new)
            assert text.count(before) == 1, f"{self.path} does not have these lines once:\n{before}"
            text = text.replace(before, after)
        file.write_text(text, encoding="utf-8")


def blocks(heading: str) -> list[tuple[str, str]]:
    """(language, content) of the blocks of a section."""
    (section,) = [part for part in re.split(r"(?m)^## ", PAGE) if part.startswith(heading)]
    return [(match[1], match[2]) for match in _FENCED.finditer(section)]


def changes(diff: str) -> list[Change]:
    """The files that a block of the page changes."""
    found = []
    for part in re.split(r"(?m)^--- a/", diff)[1:]:
        path, _, rest = part.partition("\n")
        hunks = []
        for hunk in re.split(r"(?m)^@@ .*\n", rest)[1:]:
            lines = hunk.splitlines()
            old, new = ([line[1:] for line in lines if line[:1] in kinds or not line] for kinds in (" -", " +"))
            hunks.append(("\n".join(old) + "\n", "\n".join(new) + "\n"))
        found.append(Change(path, hunks))
    return found


def existing_project(home: Path) -> Path:
    """The example without the changes of the page: as it was before."""
    project = home / "project"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("__pycache__", "README.md"))
    for heading in ("Step 5", "Step 4", "Step 2"):
        for language, content in blocks(heading):
            if language == "diff":
                for change in changes(content):
                    change.apply(project, reverse=True)
    (project / "keyproxy.toml").unlink()
    (permissions,) = [content for language, content in blocks("Before") if "BaseHasAPIKey" in content]
    (project / "jobs" / "permissions.py").write_text(permissions, encoding="utf-8")
    return project


@dataclass
class Site:
    """The project, the variables of its shell, and the processes that were started in it."""

    project: Path
    environment: dict[str, str]
    ports: dict[str, str]
    dsn: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def shell(self, script: str) -> str:
        """Run a block of commands, all of which must succeed. A command that ends in & is left running."""
        for address, real in self.ports.items():
            script = script.replace(address, real)
        lines = script.splitlines()
        for line in lines:
            if line.endswith(" &"):
                self._start(line.removesuffix(" &"))
        rest = "\n".join(line for line in lines if not line.endswith(" &"))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", rest],
            cwd=self.project,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_STUCK_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{rest}\n{done.stdout}{done.stderr}"
        return done.stdout

    def step(self, heading: str) -> str:
        """Follow a section of the page: apply its changes, run its commands. Returns their output."""
        output = ""
        for language, content in blocks(heading):
            if language == "diff":
                for change in changes(content):
                    change.apply(self.project)
            elif language == "toml":
                (self.project / "keyproxy.toml").write_text(content, encoding="utf-8")
            elif language == "sh" and not content.startswith("pip install"):
                output += self.shell(content)
        return output

    def keyproxy(self, *arguments: str) -> Any:
        """The JSON of a command of keyproxy."""
        return json.loads(self.shell(" ".join(["keyproxy", *arguments, "--json"])))

    def _start(self, command: str) -> None:
        log = (self.project / f"{len(self.processes)}.log").open("wb")
        with log:
            self.processes.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {command}"], cwd=self.project, env=self.environment, stdout=log, stderr=log
                )
            )

    def stop(self) -> None:
        """End what was started, the last first."""
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def logs(self) -> str:
        """What the processes have printed."""
        return "".join(
            path.read_text(encoding="utf-8", errors="replace") for path in sorted(self.project.glob("*.log"))
        )


@pytest.fixture
def site(deployment: Deployment, tmp_path: Path) -> Iterator[Site]:
    """The existing project with a database of its own, before step 1."""
    name = f"forecast_{secrets.token_hex(4)}"
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute(sql.SQL("CREATE DATABASE {} OWNER app").format(sql.Identifier(name)))
    app = conninfo_to_dict(make_conninfo(deployment.app_dsn, dbname=name))
    proxy, django, ops = (f"127.0.0.1:{free_port()}" for _ in range(3))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "keyproxy").write_text(
        f'#!/bin/sh\n[ "$1" = serve ] && exec {deployment.python} -m keyproxy "$@"\nexec {deployment.keyproxy} "$@"\n',
        encoding="utf-8",
    )
    (programs / "keyproxy").chmod(0o755)
    path = [str(programs), str(Path(sys.executable).parent), *deployment.programs, os.environ["PATH"]]
    environment = clean_environment() | {
        "PATH": os.pathsep.join(path),
        "HOME": str(tmp_path),
        "SECRET_KEY": secrets.token_urlsafe(40),
        "BROKER_URL": f"{deployment.broker_url}?virtual_host=9",
        "DB_NAME": name,
        "DB_USER": str(app["user"]),
        "DB_PASSWORD": str(app.get("password") or ""),
        "DB_HOST": str(app["host"]),
        "DB_PORT": str(app["port"]),
        "KEYPROXY_STORE__DSN": deployment.dsn_of(name),
        "KEYPROXY_LISTEN__ADDRESS": proxy,
        "KEYPROXY_UPSTREAM__URL": f"http://{django}",
        "KEYPROXY_OPS__ADDRESS": ops,
        "KEYPROXY_ORIGIN": f"http://{proxy}",
    }
    ports = {"127.0.0.1:8080": proxy, "127.0.0.1:8000": django}
    site = Site(existing_project(tmp_path), environment, ports, deployment.dsn_of(name))
    try:
        yield site
    finally:
        site.stop()
        with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
            superuser.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def until(condition: Callable[[], Any], what: str, site: Site) -> Any:
    """Wait for a true value; returns it."""
    deadline = time.monotonic() + _STUCK_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}; {site.logs()}"
        time.sleep(0.05)
    return found


def click(browser: httpx.Client, path: str, **fields: str) -> httpx.Response:
    """Open a page and submit its form."""
    page = browser.get(path)
    assert page.status_code == 200, page.text
    (token,) = re.findall(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)
    return browser.post(path, data={"csrfmiddlewaretoken": token, **fields})


def compute(origin: str, key: str) -> tuple[int, dict[str, Any]]:
    """Call the API with a key."""
    headers = {"Authorization": f"Api-Key {key}"}
    response = httpx.post(f"{origin}/v1/ai/jobs", headers=headers, json={"prompt": "sunny"}, timeout=_STUCK_SECONDS)
    return response.status_code, response.json()


def test_pip_command_names_extras_that_exist() -> None:
    (command,) = re.findall(r"(?m)^pip install '([^']+)'$", PAGE)
    name, extras = re.fullmatch(r"([\w-]+)\[([\w,]+)\]", command).groups()  # type: ignore[union-attr]
    project = (REPOSITORY / "client" / "pyproject.toml").read_text(encoding="utf-8")
    assert f'name = "{name}"' in project
    assert all(re.search(rf"(?m)^{extra} = \[", project) for extra in extras.split(","))


def test_steps_of_the_page_lead_from_keys_in_django_to_jobs_on_behalf_of_their_users(site: Site) -> None:
    site.shell("python manage.py migrate --verbosity 0")
    alice_key, bob_key, session = site.shell(f"python manage.py shell --verbosity 0 -c '{_ACCOUNTS}'").split()
    origin = f"http://{site.ports['127.0.0.1:8080']}"
    for heading in ("Step 1", "Step 2", "Step 3"):
        site.step(heading)
    users = {user["id"]: user["tenant"] for user in site.keyproxy("user", "list")}
    assert users == {"u_1": "acme", "u_2": "acme"}

    # Step 4 ends with a call by an old key, when the servers have started.
    (start, call) = [content for language, content in blocks("Step 4") if language == "sh"]
    (diff,) = [content for language, content in blocks("Step 4") if language == "diff"]
    (toml,) = [content for language, content in blocks("Step 4") if language == "toml"]
    for change in changes(diff):
        change.apply(site.project)
    (site.project / "keyproxy.toml").write_text(toml, encoding="utf-8")
    site.shell(start)
    until(lambda: _responds(f"http://{site.environment['KEYPROXY_OPS__ADDRESS']}/readyz"), "the proxy is ready", site)
    until(lambda: _responds(f"{origin}/login/"), "Django responds", site)
    site.environment["OLD_KEY"] = alice_key
    assert json.loads(site.shell(call)) == {"user": "alice", "is_test": False, "answer": "SUNNY"}
    assert compute(origin, bob_key) == (200, {"user": "bob", "is_test": True, "answer": "SUNNY"})
    status, _ = compute(f"http://{site.ports['127.0.0.1:8000']}", alice_key)
    assert status in (401, 403), "Django does not judge keys any more"

    site.step("Step 5")
    assert _files(site.project) == _files(EXAMPLE)
    _restart_django(site)
    live, test = ("worker.key", "worker-test.key")
    assert {(site.project / "secrets" / name).stat().st_mode & 0o777 for name in (live, test)} == {0o600}

    # A click in the session of bob runs a task that calls as bob, with the key of the mode.
    with httpx.Client(base_url=origin, cookies={"sessionid": session}, timeout=_STUCK_SECONDS) as browser:
        assert click(browser, "/", prompt="rain").status_code == 302
        assert click(browser, "/", prompt="snow", is_test="on").status_code == 302
        assert _results(site, 2) == [
            {"user": "bob", "is_test": False, "answer": "RAIN"},
            {"user": "bob", "is_test": True, "answer": "SNOW"},
        ]

        # The worker, which still runs, reads the service key again after a rotation and the end of the old key.
        (old,) = [key for key in site.keyproxy("key", "list", "--user", "u_worker") if not key["is_test"]]
        site.environment["WORKER_KEY_ID"] = old["id"]
        rotation, deletion, issue = [content for language, content in blocks("Afterwards") if language == "sh"]
        site.shell(rotation)
        site.keyproxy("key", "revoke", old["id"])
        assert click(browser, "/", prompt="hail").status_code == 302
        assert _results(site, 3)[-1] == {"user": "bob", "is_test": False, "answer": "HAIL"}

    assert re.fullmatch(r"kp_live_\w+", site.shell(issue).strip())
    site.shell(deletion)
    until(lambda: compute(origin, alice_key)[0] == 401, "the key of the deleted user is refused", site)
    assert "u_1" not in {user["id"] for user in site.keyproxy("user", "list")}
    assert compute(origin, bob_key)[0] == 200


def _restart_django(site: Site) -> None:
    """Let gunicorn load the changed code, as a deployment does."""
    site.processes[0].send_signal(signal.SIGHUP)


def _results(site: Site, count: int) -> list[dict[str, Any]]:
    """The results of all jobs, in their order, when there are so many."""
    with psycopg.connect(site.dsn, autocommit=True) as connection:

        def results() -> list[dict[str, Any]]:
            rows = connection.execute("SELECT result FROM jobs_job WHERE result IS NOT NULL ORDER BY id").fetchall()
            return [row[0] for row in rows] if len(rows) == count else []

        found: list[dict[str, Any]] = until(results, f"{count} jobs have results", site)
        return found


def _responds(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def _files(project: Path) -> dict[str, str]:
    """The sources of a project."""
    kinds = {".py", ".toml", ".html"}
    return {
        str(path.relative_to(project)): path.read_text(encoding="utf-8")
        for path in project.rglob("*")
        if path.suffix in kinds
    }
