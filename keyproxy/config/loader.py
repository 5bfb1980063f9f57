"""Read TOML and environment into `Settings`: the only reader of either.

The environment overrides the file, and the file overrides the defaults. An image or a package may set its own defaults
in the file named by KEYPROXY_DEFAULTS; any configuration overrides them. Nothing is guessed: an unknown key, a wrong
type or a value out of bounds is an error that names the key, its source, and the closest known key. All errors are
reported together. Every value keeps its origin, which `keyproxy config show` prints.

A secret may be read from a separate file: `store.dsn_file` instead of `store.dsn`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from keyproxy.config import value_types
from keyproxy.config.categories import read_categories
from keyproxy.config.models import read_models
from keyproxy.config.oauth.oauth_settings import KnownClientRow
from keyproxy.config.schema import TABLES, RouteRow, Settings, attribute, cross_checks
from keyproxy.config.tools.provider_settings import ProviderRow
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.config.value_types import Fault

ENVIRONMENT_PREFIX: Final = "KEYPROXY_"

#: Environment variables with the prefix that are not configuration keys.
_OTHER_VARIABLES: Final = frozenset(
    {
        "KEYPROXY_CONFIG",
        "KEYPROXY_DEFAULTS",
        "KEYPROXY_PG_BIN",
        "KEYPROXY_ROUTES",
        "KEYPROXY_ADMIN_URL",
        "KEYPROXY_ADMIN_TOKEN",
        "KEYPROXY_ADMIN_TOKEN_FILE",
    }
)

#: Values of secret keys that are not secret.
_NOT_SECRET: Final = ("", "embedded", "postgres")

#: The arrays of tables whose rows have only keys with checks of their own: type of the row, key that it must have.
_ARRAYS: Final[dict[str, tuple[type[Any], str]]] = {
    "tools": (ToolRow, "name"),
    "providers": (ProviderRow, "name"),
    "oauth.known_clients": (KnownClientRow, "name"),
    "routes": (RouteRow, "match"),
}


class ConfigError(Exception):
    """A configuration that cannot be used. `problems` are complete sentences, one for each problem.

    `loaded`: the configuration, if every key is readable and the keys only contradict each other.
    """

    def __init__(self, problems: list[str], loaded: Config | None = None) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
        self.loaded = loaded


class Origin(NamedTuple):
    """The source of a value: `default`, a file or an environment variable; `secret` values are masked."""

    source: str
    secret: bool


class Config(NamedTuple):
    """Settings, with the origin of every key (`table.key`)."""

    settings: Settings
    origins: Mapping[str, Origin]


class _Reading:
    """One pass over all sources; collects values, origins and problems."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
        self.origins: dict[str, Origin] = {}
        self.wrong: list[str] = []
        #: The rows of `[[models]]`, of the last file with any.
        self.model_rows: object = []
        #: Those of `[[categories]]`.
        self.category_rows: object = []
        #: Those of `_ARRAYS`.
        self.rows: dict[str, object] = {name: [] for name in _ARRAYS}
        #: The source being read, and the source of each value: later sources override earlier ones.
        self.rank = 0
        self._ranks: dict[str, int] = {}
        self.keys = {table: {key.name: key for key in dataclasses.fields(cls)} for table, cls in TABLES.items()}

    def set(self, table: str, name: str, value: object, source: str, *, is_text: bool = False) -> None:
        """Take in one value. `is_text`: from the environment, where everything is text."""
        key = self.keys[table].get(name)
        if key is None:
            twin = self.keys[table].get(name.removesuffix("_file"))
            if name.endswith("_file") and twin is not None and twin.metadata["secret"]:
                self._set_from_file(table, twin.name, value, source, is_text=is_text)
            else:
                self.unknown(f"{table}.{name}", [f"{table}.{one}" for one in self.keys[table]], source)
            return
        checked = value_types.checked(value, key.type, key.metadata["check"], is_text=is_text)
        if isinstance(checked, Fault):
            self.wrong.append(f"{table}.{name}: {checked.sentence} (set in {source})")
            return
        self.values[table][name] = checked
        self.origins[f"{table}.{name}"] = Origin(source, key.metadata["secret"])
        self._ranks[f"{table}.{name}"] = self.rank

    def unknown(self, name: str, known: list[str], source: str) -> None:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        self.wrong.append(f"{name}: no such key (set in {source}){hint}")

    def _set_from_file(self, table: str, name: str, value: object, source: str, *, is_text: bool) -> None:
        if not isinstance(value, str):
            self.wrong.append(f"{table}.{name}_file: must be a path (set in {source})")
            return
        if self._ranks.get(f"{table}.{name}") == self.rank:
            self.wrong.append(f"{table}.{name}: set both directly and by {name}_file (in {source})")
            return
        try:
            secret = Path(value).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            self.wrong.append(f"{table}.{name}_file: cannot be read: {error}")
            return
        self.set(table, name, secret, f"{source}: {name}_file", is_text=is_text)


def text(path: Path | None) -> str:
    """The content of the file; empty without one. Raises ConfigError."""
    try:
        return "" if path is None else path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not TOML: {error}"]) from error


def load(path: Path | None, environment: Mapping[str, str], *, read: str | None = None) -> Config:
    """Load settings from a TOML file (None: no file) and the environment. Raises ConfigError with all problems.

    `read`: the content of the file; None: read it now.
    """
    reading = _Reading()
    if defaults := environment.get("KEYPROXY_DEFAULTS", ""):
        _read_document(reading, Path(defaults), text(Path(defaults)))
    reading.rank = 1
    if path is not None:
        _read_document(reading, path, text(path) if read is None else read)
    reading.rank = 2
    for variable in sorted(environment):
        _read_variable(reading, variable, environment[variable])
    if "KEYPROXY_ROUTES" in environment:
        try:
            reading.rows["routes"] = json.loads(environment["KEYPROXY_ROUTES"])
        except ValueError:
            reading.wrong.append("KEYPROXY_ROUTES: must be a JSON array of objects")
    arrays: dict[str, Any] = {attribute(name): tuple(_rows(reading, name)) for name in _ARRAYS}
    models, wrong_models = read_models(reading.model_rows)
    categories, wrong_categories = read_categories(reading.category_rows)
    reading.wrong += [*wrong_models, *wrong_categories]
    if reading.wrong:
        raise ConfigError(reading.wrong)
    tables = {attribute(table): cls(**reading.values[table]) for table, cls in TABLES.items()}
    settings = Settings(**tables, models=models, categories=categories, **arrays)
    loaded = Config(settings, _with_defaults(reading))
    wrong = cross_checks(settings)
    if wrong:
        raise ConfigError(wrong, loaded)
    return loaded


def flatten(settings: Settings) -> Iterator[tuple[str, object]]:
    """Every key as (`table.key`, value), in the order of the file; then one for each row of an array of tables."""
    for table in TABLES:
        for key, value in dataclasses.asdict(getattr(settings, attribute(table))).items():
            yield f"{table}.{key}", value
    for number, model in enumerate(settings.models, start=1):
        yield f"models[{number}]", {**dataclasses.asdict(model), "scopes": sorted(model.scopes)}
    for number, category in enumerate(settings.categories, start=1):
        yield f"categories[{number}]", {**dataclasses.asdict(category), "scopes": sorted(category.scopes)}
    for array in _ARRAYS:
        for number, row in enumerate(getattr(settings, attribute(array)), start=1):
            yield f"{array}[{number}]", dataclasses.asdict(row)


def mask(value: object) -> object:
    """A secret value for display, with its passwords masked."""
    if not isinstance(value, str):
        return value
    if "://" not in value:
        # Without an address there is no part that may be shown, except for words such as `embedded`.
        return value if value in _NOT_SECRET else "***"
    address, question, query = value.partition("?")
    # Up to the last @: a password may contain any character, even one that should have been encoded.
    address = re.sub(r"(?<=://)([^/@:]*):.*@", r"\1:***@", address)
    return address + question + re.sub(r"(?i)((?:^|&)[^=&]*pass[^=&]*=)[^&]*", r"\1***", query)


def _read_document(reading: _Reading, path: Path, content: str) -> None:
    document = _parse(path, content)
    reading.model_rows = document.pop("models", reading.model_rows)
    reading.category_rows = document.pop("categories", reading.category_rows)
    document = _with_inner_tables(document)
    for array in _ARRAYS:
        reading.rows[array] = document.pop(array, reading.rows[array])
    for table, keys in document.items():
        if table not in TABLES:
            reading.unknown(table, [*TABLES, "models", "categories", *_ARRAYS], str(path))
        elif not isinstance(keys, dict):
            reading.wrong.append(f"{table}: must be a table, [{table}] (set in {path})")
        else:
            for name, value in _twins_last(keys):
                reading.set(table, name, value, str(path))


def _with_inner_tables(document: Mapping[str, Any]) -> dict[str, Any]:
    """The tables, with those within another one beside it, under their whole name."""
    found = dict(document)
    for inner in (name for name in (*TABLES, *_ARRAYS) if "." in name):
        table, _, key = inner.partition(".")
        outer = found.get(table)
        if isinstance(outer, dict) and key in outer:
            found[inner] = outer[key]
            found[table] = {name: value for name, value in outer.items() if name != key}
    return found


def _parse(path: Path, content: str) -> dict[str, Any]:
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path}: is not TOML: {error}"]) from error


def _twins_last(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from sorted(content.items(), key=lambda item: item[0].endswith("_file"))


def _read_variable(reading: _Reading, variable: str, value: str) -> None:
    if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _OTHER_VARIABLES:
        return
    known = [
        f"{ENVIRONMENT_PREFIX}{table.replace('.', '__')}__{name}".upper()
        for table, keys in reading.keys.items()
        for name in keys
    ]
    table, separator, name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
    if (inner := f"{table}.{name.partition('__')[0]}") in TABLES:
        table, name = inner, name.partition("__")[2]
    if separator and table in TABLES:
        reading.set(table, name, value, variable, is_text=True)
    # A variable without a double underscore is not ours, such as the KEYPROXY_PORT that Kubernetes sets for a service
    # of this name, unless it differs from a known key only by the missing underscore.
    elif separator or variable.upper() in {one.replace("__", "_") for one in known}:
        reading.unknown(variable, known, "the environment")


def _rows(reading: _Reading, array: str) -> Iterator[Any]:
    """The rows of one of `_ARRAYS`."""
    row_type, required = _ARRAYS[array]
    rows = reading.rows[array]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        reading.wrong.append(f"{array}: must be an array of tables, [[{array}]]")
        return
    keys = {key.name: key for key in dataclasses.fields(row_type)}
    for number, row in enumerate(rows, start=1):
        values: dict[str, Any] = {}
        for name, value in row.items():
            if name not in keys:
                reading.unknown(f"{array}[{number}].{name}", [f"{array}[{number}].{key}" for key in keys], array)
                continue
            checked = value_types.checked(value, keys[name].type, keys[name].metadata["check"], is_text=False)
            if isinstance(checked, Fault):
                reading.wrong.append(f"{array}[{number}].{name}: {checked.sentence}")
            else:
                values[name] = checked
        if required not in row:
            reading.wrong.append(f"{array}[{number}]: has no {required}")
        yield row_type(**values)


def _with_defaults(reading: _Reading) -> dict[str, Origin]:
    return {
        f"{table}.{name}": reading.origins.get(f"{table}.{name}", Origin("default", key.metadata["secret"]))
        for table, keys in reading.keys.items()
        for name, key in keys.items()
    }
