"""The documentation matches the program: every code has an entry, every link a target."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from keyproxy import cli
from keyproxy.admin.problems import Problem
from keyproxy.admin.scopes import DESCRIPTIONS
from keyproxy.reasons import Reason

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

_FENCED = re.compile(r"(?ms)^(```|~~~).*?^\1$")
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\[[^\]\n]*\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)")
_NAMED_FILE = re.compile(r"(?<![\w/.])(?:docs|tests|keyproxy|bench)/[\w./*-]*\w\.(?:md|py|sql|toml|sh)\b")
_HEADING = re.compile(r"(?m)^#+ (.*)$")
_REASON_ENTRY = re.compile(r"`([a-z_]+)`(?=[^()]*\((\d{3}))")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _links(page: Path) -> Iterator[tuple[str, str]]:
    """(file, fragment) of every link to a file of the repository."""
    for target in _LINK.findall(_INLINE_CODE.sub("", _FENCED.sub("", _text(page)))):
        if not re.match(r"[a-z][a-z0-9+.-]*:", target):
            path, _, fragment = target.partition("#")
            yield path, fragment


def _anchors(page: Path) -> set[str]:
    """The link fragments of the headings, as code forges generate them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(_text(page))}


def _entries() -> list[tuple[str, int]]:
    """(code, status) of every entry of the failure modes."""
    headings = re.findall(r"(?m)^### (.*)$", _text(ROOT / "docs" / "failure-modes.md"))
    found: list[tuple[str, int]] = []
    for heading in headings:
        codes = _REASON_ENTRY.findall(heading)
        assert len(codes) == re.sub(r"\([^)]*\)", "", heading).count("`") / 2 > 0, heading
        found += [(code, int(status)) for code, status in codes]
    return found


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.code)
def test_every_code_has_one_entry_in_the_failure_modes_with_its_status(reason: Reason) -> None:
    assert [status for code, status in _entries() if code == reason.code] == [reason.value.status]


def test_failure_modes_have_no_entry_for_a_code_that_does_not_exist() -> None:
    assert {code for code, _ in _entries()} - {reason.code for reason in Reason} == set()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_leads_to_an_existing_file_and_heading(page: Path) -> None:
    for path, fragment in _links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{path} leads out"
        assert target.exists(), f"there is no {path}"
        if fragment and target.suffix == ".md":
            assert fragment in _anchors(target), f"{path} has no heading #{fragment}"


def test_ledger_page_names_the_migration_with_the_current_text_of_every_function() -> None:
    rows = re.findall(r"(?m)^\| - (.*?) \| .*/(\d{4}_\w+\.sql) \|$", _text(ROOT / "docs" / "ledger.md"))
    named = {name: file for text, file in rows for name in re.findall(r"`(\w+)`", text)}
    current: dict[str, tuple[str, str]] = {}
    for file in sorted((ROOT / "keyproxy" / "store" / "postgres" / "migrations").glob("*.sql")):
        for function in re.split(r"(?m)^CREATE (?:OR REPLACE )?FUNCTION keyproxy\.", _text(file))[1:]:
            current[function[: function.index("(")]] = file.name, function.partition("$$;")[0]
    assert named == {name: current[name][0] for name in named}
    of_ledger = re.compile(r"keyproxy\.(?:windows|leases|lease_holders|ledger_history|idempotent_charges)\b")
    assert {name for name, (_, text) in current.items() if of_ledger.search(text)} - named.keys() == set()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_file_named_in_the_docs_exists(page: Path) -> None:
    named = {name for name in _NAMED_FILE.findall(_text(page)) if "NNNN" not in name}
    assert {name for name in named if not any(ROOT.glob(name))} == set()


def test_every_guarantee_of_the_readme_names_existing_tests() -> None:
    rows = re.findall(r"(?m)^\| (P\d+) \| [^|]+ \| ([^|]*) \|$", _text(ROOT / "README.md"))
    assert len({number for number, _ in rows}) == len(rows) > 0
    for number, shown_by in rows:
        files = _LINK.findall(shown_by)
        assert files, f"{number} is shown by nothing"
        for file in files:
            assert re.search(r"(?m)^(async )?def test_|^class Test", _text(ROOT / file)), f"{file} holds no test"


def test_the_two_commands_of_the_readme_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z][\w-]*(?: [a-z][\w-]*)*):", _text(ROOT / "Makefile")))
    there = {name for line in targets for name in line.split()}
    wanted = set(re.findall(r"(?m)(?:^ +|`)make ([a-z][\w-]*)", _text(ROOT / "README.md")))
    assert {"demo", "test"} <= wanted <= there


def test_admin_api_page_lists_every_problem_and_every_scope() -> None:
    page = _text(ROOT / "docs" / "admin-api.md")
    documented = {
        (code, int(status))
        for codes, status in re.findall(r"(?m)^\| ((?:`[a-z_]+`(?:, )?)+) \| (\d{3}) \|", page)
        for code in re.findall(r"`([a-z_]+)`", codes)
    }
    assert documented == {(problem.code, problem.status) for problem in Problem}
    assert set(re.findall(r"(?m)^\| `([a-z]+:[a-z]+)` \| (.*) \|$", page)) == {
        *DESCRIPTIONS.items(),
        ("tenant:acme", "is bound to that tenant: reads and changes only its objects, whatever its other scopes"),
    }


def _groups() -> Iterator[click.Group]:
    yield cli.root
    context = click.Context(cli.root)
    for name in cli.root.list_commands(context):
        command = cli.root.get_command(context, name)
        assert command is not None
        assert command.name == name
        if isinstance(command, click.Group):
            yield command


GROUPS = list(_groups())


@pytest.mark.parametrize("group", GROUPS, ids=[group.name or "" for group in GROUPS])
def test_command_lists_fit_a_terminal_of_80_columns(group: click.Group) -> None:
    listed = group.get_help(click.Context(group, terminal_width=80)).partition("Commands:")[2]
    assert [line for line in listed.splitlines() if line.endswith("...")] == []


def _shown_commands() -> Iterator[tuple[str, str]]:
    """(page, command) of each `keyproxy …` in inline code and indented blocks; what the shell adds is cut off."""
    for page in PAGES:
        if page.name == "CHANGELOG.md" or page.parent.name == "decisions":
            continue
        text = _text(page)
        for command in re.findall(r"(?m)(?:`|^ {4,}|\| )(keyproxy(?: [^`\n]+)?)", text):
            yield _name(page), re.split(r" \| | > |  +#", command)[0]


def test_options_of_every_command_in_the_docs_exist() -> None:
    wrong = []
    for page, line in _shown_commands():
        command: click.Command = cli.root
        words = iter(line.split()[1:])
        for word in words:
            found = command.get_command(click.Context(command), word) if isinstance(command, click.Group) else None
            if found is None:
                break
            command = found
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        options = set(re.findall(r"(?<= )--[a-z][a-z-]*", line)) - {"--help", "--version"}
        if not options <= known:
            wrong.append((page, line, sorted(options - known)))
    assert wrong == []
