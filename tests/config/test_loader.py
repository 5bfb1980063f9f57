"""The configuration: sources, valid values, and error messages."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from keyproxy.config import loader
from keyproxy.config.categories import CATEGORY_KEYS
from keyproxy.config.loader import Config, ConfigError
from keyproxy.config.models import MODEL_KEYS
from keyproxy.config.oauth.oauth_settings import KnownClientRow
from keyproxy.config.schema import TABLES, RouteRow, Settings, attribute
from keyproxy.config.tools.provider_settings import ProviderRow
from keyproxy.config.tools.tool_settings import ToolRow

EXAMPLE = (Path(__file__).parents[2] / "config.example.toml").read_text(encoding="utf-8")
#: The same with the example model, category and route uncommented.
EXAMPLE_WITH_ROUTE = re.sub(
    r"(?m)^# (?=\[\[(?:models|categories|tools|providers|oauth\.known_clients|routes)\]\]|\w+ = )", "", EXAMPLE
)

#: Every key of the file, with its default.
DEFAULTS = {
    (table, key.name): getattr(cls(), key.name) for table, cls in TABLES.items() for key in dataclasses.fields(cls)
}
SECRETS = {
    (table, key.name) for table, cls in TABLES.items() for key in dataclasses.fields(cls) if key.metadata["secret"]
}


class Reader:
    """Loads configurations written below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def file(self, text: str, name: str = "secret") -> Path:
        path = self.directory / name
        path.write_text(text, encoding="utf-8")
        return path

    def load(self, text: str = "", **environment: str) -> Config:
        return loader.load(self.file(text, "keyproxy.toml"), environment)

    def wrong(self, text: str = "", **environment: str) -> list[str]:
        with pytest.raises(ConfigError) as error:
            self.load(text, **environment)
        assert str(error.value)
        return error.value.problems


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def values(settings: Settings) -> dict[tuple[str, str], object]:
    return {(table, name): getattr(getattr(settings, attribute(table)), name) for table, name in DEFAULTS}


def rows(of: Mapping[str, Mapping[str, object]]) -> dict[tuple[str, str], object]:
    found: dict[tuple[str, str], object] = {}
    for table, content in of.items():
        for name, value in content.items():
            inner = f"{table}.{name}"
            if inner in TABLES and isinstance(value, Mapping):
                found |= {(inner, key): one for key, one in value.items()}
            else:
                found[table, name] = value
    return found


# -- the example


def test_the_example_has_every_key_with_exactly_its_default() -> None:
    document = tomllib.loads(EXAMPLE)
    assert rows(document) == DEFAULTS
    assert {key: type(value) for key, value in rows(document).items()} == {
        key: type(value) for key, value in DEFAULTS.items()
    }
    assert list(document) == [table for table in TABLES if "." not in table]


def test_the_example_s_route_has_every_key_and_shows_the_defaults_of_those_that_have_one() -> None:
    document = tomllib.loads(EXAMPLE_WITH_ROUTE)
    (route,) = document.pop("routes")
    (model,) = document.pop("models")
    (category,) = document.pop("categories")
    (tool,) = document.pop("tools")
    (provider,) = document.pop("providers")
    known_clients = document["oauth"].pop("known_clients")
    assert rows(document) == DEFAULTS
    assert list(route) == [key.name for key in dataclasses.fields(RouteRow)]
    assert (route["error_shape"], route["model"], route["cap_field"], route["idempotency"]) == (
        RouteRow().error_shape, RouteRow().model, RouteRow().cap_field, RouteRow().idempotency,
    )  # fmt: skip
    assert list(model) == list(MODEL_KEYS)
    assert list(category) == list(CATEGORY_KEYS)
    assert list(tool) == [key.name for key in dataclasses.fields(ToolRow)]
    assert list(provider) == [key.name for key in dataclasses.fields(ProviderRow)]
    assert list(known_clients[0]) == [key.name for key in dataclasses.fields(KnownClientRow)]
    assert route["binds"] == []
    assert (route["prompt"], route["category"], route["unregistered"]) == ("", "", "")


def test_the_example_loads_as_the_defaults(reader: Reader) -> None:
    assert reader.load(EXAMPLE).settings == reader.load().settings == loader.load(None, {}).settings == Settings()
    with_route = reader.load(EXAMPLE_WITH_ROUTE).settings
    assert values(with_route) == DEFAULTS
    (row,) = with_route.routes
    assert row == RouteRow("POST /v1/ai/jobs", ["jobs:write"], tokens="openai", name="jobs", cap="insert")
    assert [model.name for model in with_route.models] == ["gpt-4o"]
    assert [(one.name, one.scopes) for one in with_route.categories] == [("code", frozenset({"prompt:code"}))]
    route = with_route.route_table().match(b"POST", b"/v1/ai/jobs")
    assert route is not None
    assert (route.name, route.scopes) == (row.name, frozenset(row.scopes))


# -- sources


@pytest.mark.parametrize(
    ("key", "in_file", "in_environment", "from_file", "from_environment"),
    [
        ("listen.address", '"[::1]:1"', "unix:/run/x.sock", "[::1]:1", "unix:/run/x.sock"),
        ("listen.connections_max", "7", "8", 7, 8),
        ("listen.drain_seconds", "0", "1.5", 0.0, 1.5),
        ("listen.drain_seconds", "2.5", "3", 2.5, 3.0),
        ("reminders.before_days", "[30]", " 7, 1 ", [30], [7, 1]),
        ("listen.trusted_proxies", '["10.0.0.0/8"]', " unix, ::1 ,", ["10.0.0.0/8"], ["unix", "::1"]),
        ("keys.accept_foreign", "false", "TRUE", False, True),
        ("keys.accept_foreign", "true", "0", True, False),
        ("store.dsn", '"postgresql://a"', "postgresql://b", "postgresql://a", "postgresql://b"),
    ],
)
def test_environment_over_file_over_default(
    reader: Reader, key: str, in_file: str, in_environment: str, from_file: object, from_environment: object
) -> None:
    table, name = key.split(".")
    text, variable = f"[{table}]\n{name} = {in_file}", f"KEYPROXY_{table}__{name}".upper()
    for loaded, value, source in (
        (reader.load(), DEFAULTS[table, name], "default"),
        (reader.load(text), from_file, str(reader.directory / "keyproxy.toml")),
        (reader.load(text, **{variable: in_environment}), from_environment, variable),
        (reader.load(**{variable: in_environment}), from_environment, variable),
    ):
        assert values(loaded.settings) == DEFAULTS | {(table, name): value}
        assert type(values(loaded.settings)[table, name]) is type(DEFAULTS[table, name])
        assert loaded.origins[key].source == source


@pytest.mark.parametrize(
    ("in_file", "in_environment", "value"),
    [
        ("true", "TRUE", True), ("true", "1", True), ("false", "false", False), ("false", "0", False),
        ('"refusals"', "refusals", "refusals"), ('"all"', "all", "all"), ("0.01", "0.01", 0.01), ("1", "1.0", 1.0),
    ],
)  # fmt: skip
def test_log_access_is_a_boolean_all_refusals_or_a_fraction(
    reader: Reader, in_file: str, in_environment: str, value: object
) -> None:
    from_file = reader.load(f"[log]\naccess = {in_file}").settings.log.access
    from_environment = reader.load(KEYPROXY_LOG__ACCESS=in_environment).settings.log.access
    assert (from_file, type(from_file)) == (value, type(value))
    assert (from_environment, type(from_environment)) == (value, type(value))


@pytest.mark.parametrize("key", DEFAULTS, ids=".".join)
def test_every_key_is_an_environment_variable_with_an_origin(reader: Reader, key: tuple[str, str]) -> None:
    default = DEFAULTS[key]
    text = ",".join(map(str, default)) if isinstance(default, list) else str(default)
    variable = "KEYPROXY_{}__{}".format(*key).upper()
    loaded = reader.load(**{variable: text})
    assert loaded.settings == Settings()
    assert loaded.origins[".".join(key)] == (variable, key in SECRETS)
    assert len(loaded.origins) == len(DEFAULTS)


def test_routes_may_come_from_the_environment(reader: Reader) -> None:
    loaded = reader.load('[[routes]]\nmatch = "GET /a"', KEYPROXY_ROUTES='[{"match": "GET /b", "scopes": ["x"]}]')
    assert loaded.settings.routes == (RouteRow("GET /b", ["x"]),)


@pytest.mark.parametrize(
    "variable",
    [
        "KEYPROXY_PORT", "KEYPROXY_PORT_8080_TCP", "KEYPROXY_PORT_8080_TCP_ADDR", "KEYPROXY_PORT_8080_TCP_PORT",
        "KEYPROXY_PORT_8080_TCP_PROTO", "KEYPROXY_SERVICE_HOST", "KEYPROXY_SERVICE_PORT", "KEYPROXY_SERVICE_PORT_HTTP",
        "KEYPROXY_ADMIN_PORT", "KEYPROXY_ADMIN_SERVICE_HOST", "KEYPROXY_CONFIG", "KEYPROXY_PG_BIN", "PATH",
        "STORE__DSN", "XKEYPROXY_STORE__DSN",
    ],
)  # fmt: skip
def test_variables_of_other_programs_are_ignored(reader: Reader, variable: str) -> None:
    assert reader.load(**{variable: "tcp://10.0.0.1:8080"}).settings == Settings()


# -- secrets in files of their own


@pytest.mark.parametrize("key", sorted(SECRETS), ids=".".join)
def test_a_secret_has_a_twin_that_names_its_file(reader: Reader, key: tuple[str, str]) -> None:
    table, name = key
    secret, other = {
        "dsn": ("postgresql://in-file/d", "embedded"),
        "backend": ("postgres", "redis://h"),
        "webhook_secret": (f"whsec_{'YWJj' * 8}", f"whsec_{'ZGVm' * 8}"),
    }[name]
    path = reader.file(f"\n {secret}\n")
    variable = f"KEYPROXY_{table}__{name}".upper()
    in_file = f'[{table}]\n{name}_file = "{path}"'
    for loaded in (reader.load(in_file), reader.load(**{f"{variable}_FILE": str(path)})):
        assert values(loaded.settings)[key] == secret
        assert loaded.origins[f"{table}.{name}"].secret
        assert f"{name}_file" in loaded.origins[f"{table}.{name}"].source
    assert values(reader.load(in_file, **{variable: other}).settings)[key] == other
    assert (
        values(reader.load(f'[{table}]\n{name} = "{other}"', **{f"{variable}_FILE": str(path)}).settings)[key] == secret
    )


@pytest.mark.parametrize("order", [("dsn", "dsn_file"), ("dsn_file", "dsn")])
@pytest.mark.parametrize("place", ["file", "environment"])
def test_a_secret_set_in_place_and_by_its_twin_is_refused(reader: Reader, order: tuple[str, str], place: str) -> None:
    both = {"dsn": "postgresql://a", "dsn_file": str(reader.file("postgresql://b"))}
    if place == "file":
        problems = reader.wrong("[store]\n" + "\n".join(f'{name} = "{both[name]}"' for name in order))
    else:
        problems = reader.wrong(**{f"KEYPROXY_STORE__{name}".upper(): both[name] for name in order})
    assert len(problems) == 1
    assert "store.dsn: set both directly and by dsn_file" in problems[0]


@pytest.mark.parametrize("value", ['"/nowhere/secret"', '"/"', "7", '"a\\u0000b"', '""'])
def test_unreadable_secret_file_is_reported(reader: Reader, value: str) -> None:
    (problem,) = reader.wrong(f"[store]\ndsn_file = {value}")
    assert problem.startswith("store.dsn_file: ")


def test_error_about_a_secret_does_not_contain_it(reader: Reader) -> None:
    path = reader.file("hunter2-in-file")
    (in_place,) = reader.wrong('[store]\ndsn = "hunter2"')
    (in_variable,) = reader.wrong(KEYPROXY_STORE__DSN="hunter2")
    (in_file,) = reader.wrong(f'[store]\ndsn_file = "{path}"')
    assert all("hunter2" not in problem and "store.dsn" in problem for problem in (in_place, in_variable, in_file))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("embedded", "embedded"),
        ("postgres", "postgres"),
        ("postgresql://u@h:5432/d", "postgresql://u@h:5432/d"),
        ("postgresql://u:hunter2@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u:hunt@er2@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u:%68unter2@h/d?a=b", "postgresql://u:***@h/d?a=b"),
        ("redis://:hunter2@h", "redis://:***@h"),
        ("postgresql://h/d?user=u&password=hunter2&a=b", "postgresql://h/d?user=u&password=***&a=b"),
        ("rediss://u:hunter2@h:6379/0", "rediss://u:***@h:6379/0"),
        ("unix:///r.sock?db=1&password=hunter2", "unix:///r.sock?db=1&password=***"),
        ("postgresql://h/d?PassWord=hunter2", "postgresql://h/d?PassWord=***"),
        ("whsec_hunter2", "***"),
        ("", ""),
        (7, 7),
    ],
)
def test_a_secret_is_shown_without_its_password(value: object, shown: object) -> None:
    assert loader.mask(value) == shown


@pytest.mark.parametrize(
    "dsn", ["postgresql://u:hunter2/x@h/d", "postgresql://u:/hunter2@h", "postgresql://h/d?sslpassword=hunter2"]
)
def test_no_part_of_a_password_is_shown_however_it_is_written(dsn: str) -> None:
    assert "hunter2" not in str(loader.mask(dsn))


# -- mistakes


@pytest.mark.parametrize(
    ("text", "environment", "name", "suggestion"),
    [
        ("[upstrem]", {}, "upstrem", "upstream"),
        ("[route]", {}, "route", "routes"),
        ("[zzzzzz]", {}, "zzzzzz", None),
        ('[listen]\nadress = "x"', {}, "listen.adress", "listen.address"),
        ("[store]\npool_max = 3", {}, "store.pool_max", "store.pool_size_max"),
        ('[listen]\naddress_file = "x"', {}, "listen.address_file", "listen.address"),
        ("workers = 1", {}, "workers", None),
        ('[[routes]]\nmatch = "GET /a"\nscope = []', {}, "routes[1].scope", "routes[1].scopes"),
        ("", {"KEYPROXY_STORE_DSN": "x"}, "KEYPROXY_STORE_DSN", "KEYPROXY_STORE__DSN"),
        ("", {"KEYPROXY_STORE__DNS": "x"}, "store.dns", "store.dsn"),
        ("", {"KEYPROXY_STOR__DSN": "x"}, "KEYPROXY_STOR__DSN", "KEYPROXY_STORE__DSN"),
        ("", {"KEYPROXY_LISTEN__TLS_KEY_FILES": "x"}, "listen.tls_key_files", "listen.tls_key_file"),
    ],
)
def test_unknown_name_is_an_error_with_the_closest_known_name(
    reader: Reader, text: str, environment: dict[str, str], name: str, suggestion: str | None
) -> None:
    (problem,) = reader.wrong(text, **environment)
    assert problem.startswith(f"{name}: ")
    assert suggestion is None or problem.endswith(f"; did you mean {suggestion}?")


#: For each key, values in TOML that are refused, and that are accepted.
BOUNDS: dict[str, tuple[list[str], list[str]]] = {
    "listen.address": (['""', '"x"', '":1"', '"h:"', '"h:x"', '"h:65536"', '"unix:x"', "1"], ['"h:0"', '"h:65535"']),
    "ops.address": (['"9090"', '"127.0.0.1:8080"'], ['"unix:/a"']),
    "listen.socket_mode": (['""', '"0700"', '"0400"', '"0888"', '"00600"', "600", "0o600"],
                           ['"0600"', '"600"', '"0660"', '"0666"']),
    "ops.socket_mode": (['"0611"'], ['"0660"']),
    "admin.socket_mode": (['"0060"'], ['"0660"']),
    "listen.linger_seconds": (["-0.1", "3601"], ["0", "5.0", "3600"]),
    "listen.connections_max": (["0", "-1", "1.0", '"1"', "true"], ["1"]),
    "listen.header_bytes_max": (["1023", "1048577"], ["1024", "1048576"]),
    "listen.body_bytes_max": (["-1"], ["0", "1"]),
    "listen.drain_seconds": (["-0.1", '"1"', "true", "inf", "nan", "1" + "0" * 400], ["0", "0.0"]),
    "listen.header_timeout_seconds": (["0", "0.049"], ["0.05"]),
    "listen.trusted_proxies": (['"10.0.0.0/8"', '["x"]', '["10.0.0.1/8"]', "[1]"], ["[]", '["unix", "::1"]']),
    "listen.workers": (["-1", "257"], ["0", "1", "256"]),
    "listen.tls_key_file": (['"/a.pem"'], ['""']),
    "admin.tls_key_file": (['"/a.pem"'], ['""']),
    "admin.connections_max": (["0"], ["1"]),
    "listen.tls_client_ca_file": (['"/a.pem"'], ['""']),
    "upstream.url": (['""', '"h:1"', '"ftp://h"', '"http://"', '"http://h/p"', '"http://h?q"',
                      '"http://u:p@h"', '"http://h:x"', '"http://h:0"', '"http://h:65536"', '"unix:x"',
                      '"http://a b"', '"http://h\\nx"'],
     ['"http://h"', '"http://h/"', '"http://h:1"', '"http://[::1]:1"', '"unix:/a"']),
    "upstream.connections_per_user_max": (["-1", "1.5"], ["0", "1"]),
    "upstream.test_url": (['"h"'], ['""', '"http://h"']),
    "store.dsn": (['""', '"mysql://h"', '"Embedded"', '"postgresql://h/d?channel_binding=require"', '"postgresql://h:x"',
                   '"postgresql://h/d?target_session_attrs=standby"'],
                  ['"embedded"', '"postgres://h"', '"postgresql://h"', '"postgresql://a,b:1/d?connect_timeout=5&gssencmode=disable"']),
    "cache.stale_seconds": (["29.9"], ["30"]),
    "cache.fresh_seconds": (["600.1"], ["600"]),
    "identity.header_prefix": (['""', '"X-"', '"X-A"', '"Keyproxy-"', '"X-A B-"', '"X_A-"', '"X-A\\r\\n-"',
                                '"X-Forwarded-"', '"X-Api-"', '"X-Request-"'], ['"X-A-"', '"X-Acme-Id-"']),
    "keys.prefix": (['""', '"KP"', '"1a"', '"k_p"', '"a23456789012345678"'], ['"a"', '"a234567890123456"']),
    "keys.age_days_max": (["-1", "36501"], ["0", "36500"]),
    "keys.accept_foreign": (["1", '"true"'], ["true", "false"]),
    "ledger.backend": (['""', '"redis"', '"postgresql://h"', '"redis://"', '"redis://h:x"', '"redis://h/a"', '"redis://h:0"',
                       '"unix:r"', '"redis://h?dbx=1"', '"rediss://h#a"', '"http://h"'],
                      ['"postgres"', '"redis://h"', '"redis://u:p@h:1/2"', '"rediss://h?ssl_ca_certs=/a"',
                       '"unix:///a?db=1&password=p"']),
    "ledger.unreachable": (['"deny"'], ['"refuse"', '"allow"']),
    "reminders.webhook_url": (['"http://h/p"', '"h"', '"https://"', '"https://u:p@h/"', '"https://h:0"', '"ftp://h"',
                               '"https://h/a b"', '"http://127.0.0.1.example.com/"', '"http://[::2]/"'], ['""']),
    "reminders.webhook_secret": (['"x"', '"whsec_"', f'"whsec_{"YWJj" * 7}YW=="', '"whsec_!!!!"',
                                  f'"whsec_{"YWJj" * 21}YWI="', f'"whsec_{"YWJj" * 8}\\n"'],
                                 ['""', f'"whsec_{"YWJj" * 8}"', f'"whsec_{"YWJj" * 21}YQ=="']),
    "reminders.before_days": (["[]", "[0]", "[366]", "[1, 1]", "[1.0]", '["1"]', "[true]", "1", str([*range(1, 12)])],
                              ["[1]", "[365, 30, 1]", str([*range(1, 11)])]),
    "limits.idempotency_repeats_max": (["-1", "1001", "1.0"], ["0", "1000"]),
    "alerts.percentages": (["[0]", "[101]", "[80, 80]", "[1, 2, 3, 4, 5, 6]", '["80"]', "[80.5]", "80"],
                           ["[]", "[1]", "[100]", "[1, 50, 80, 90, 100]"]),
    "alerts.webhook_url": (['"http://h/p"', '"h"'], ['""']),
    "alerts.webhook_secret": (['"x"'], ['""', f'"whsec_{"YWJj" * 8}"']),
    "errors.invalid_key_status": (["400", "402"], ["401", "403"]),
    "errors.spent_status": (["403"], ["402", "429"]),
    "log.level": (['"INFO"', '"trace"'], ['"debug"', '"error"']),
    "log.access": (['"true"', '"All"', '"refusal"', '""', "0", "0.0", "-0.1", "1.1", "nan", "[0.1]"],
                   ["true", "false", '"all"', '"refusals"', "0.01", "1.0", "1"]),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (_, values) in BOUNDS.items() for value in values])
def test_a_value_of_its_type_and_within_its_bounds_is_taken(reader: Reader, key: str, value: str) -> None:
    table, name = key.split(".")
    assert reader.load(f"[{table}]\n{name} = {value}").origins[key].source != "default"


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (values, _) in BOUNDS.items() for value in values])
def test_any_other_value_is_refused_by_the_name_of_its_key(reader: Reader, key: str, value: str) -> None:
    table, name = key.split(".")
    (problem,) = reader.wrong(f"[{table}]\n{name} = {value}")
    assert re.match(rf"{key}: |cache\.stale_seconds: ", problem)


def test_several_workers_need_a_port(reader: Reader) -> None:
    for workers in (0, 2):
        (problem,) = reader.wrong(f'[listen]\naddress = "unix:/run/a.sock"\nworkers = {workers}')
        assert problem.startswith("listen.workers: must be 1 with a unix socket")
    reader.load('[listen]\naddress = "unix:/run/a.sock"')


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KEYPROXY_KEYS__ACCEPT_FOREIGN", "yes"),
        ("KEYPROXY_KEYS__ACCEPT_FOREIGN", ""),
        ("KEYPROXY_KEYS__AGE_DAYS_MAX", ""),
        ("KEYPROXY_KEYS__AGE_DAYS_MAX", "1.0"),
        ("KEYPROXY_KEYS__AGE_DAYS_MAX", "+1"),
        ("KEYPROXY_KEYS__AGE_DAYS_MAX", " 1"),
        ("KEYPROXY_KEYS__AGE_DAYS_MAX", "1_0"),
        ("KEYPROXY_KEYS__AGE_DAYS_MAX", "٣"),
        ("KEYPROXY_LISTEN__DRAIN_SECONDS", "1e3"),
        ("KEYPROXY_LISTEN__DRAIN_SECONDS", "nan"),
        ("KEYPROXY_LISTEN__DRAIN_SECONDS", "1."),
        ("KEYPROXY_REMINDERS__BEFORE_DAYS", ""),
        ("KEYPROXY_REMINDERS__BEFORE_DAYS", "3,,1"),
        ("KEYPROXY_REMINDERS__BEFORE_DAYS", "3;1"),
    ],
)
def test_text_of_the_environment_is_read_strictly(reader: Reader, variable: str, value: str) -> None:
    (problem,) = reader.wrong(**{variable: value})
    assert problem.endswith(f"(set in {variable})")


@pytest.mark.parametrize(
    "route",
    [
        "", 'match = ""', 'match = "GET"', 'match = "GET /{"', "match = 1", 'match = "GET /a"\nscopes = ["a *"]',
        'match = "GET /a"\nscopes = "a"', 'match = "GET /a"\nerror_shape = "xml"', 'match = "GET /a"\ntokens = "bytes"',
        'match = "GET /a"\n[[routes]]\nmatch = "GET /a"',
    ],
)  # fmt: skip
def test_invalid_route_is_reported(reader: Reader, route: str) -> None:
    (problem,) = reader.wrong(f"[[routes]]\n{route}")
    assert problem.startswith("routes")


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        ("listen = 1", {}),
        ("[[listen]]", {}),
        ("routes = 1", {}),
        ("routes = [1]", {}),
        ("[routes]", {}),
        ("", {"KEYPROXY_ROUTES": "{}"}),
        ("", {"KEYPROXY_ROUTES": "["}),
        ("", {"KEYPROXY_ROUTES": "[1]"}),
        ("[listen", {}),
        ("a = 1\na = 2", {}),
    ],
)
def test_wrong_structure_is_reported(reader: Reader, text: str, environment: dict[str, str]) -> None:
    assert len(reader.wrong(text, **environment)) >= 1


def test_unreadable_file_is_reported(tmp_path: Path) -> None:
    not_utf8 = tmp_path / "latin.toml"
    not_utf8.write_bytes(b"# \xe9")
    for path in (tmp_path / "absent.toml", tmp_path, not_utf8):
        with pytest.raises(ConfigError) as error:
            loader.load(path, {})
        assert error.value.problems[0].startswith(f"{path}: ")


def test_all_problems_are_reported_together(reader: Reader) -> None:
    problems = reader.wrong(
        """
        typo = 1
        [upstrem]
        [listen]
        workers = -2
        adress = "x"
        [store]
        dsn_file = "/nowhere"
        [[routes]]
        match = "GET"
        [[routes]]
        scopes = ["a b"]
        """,
        KEYPROXY_LOG__LEVEL="loud",
        KEYPROXY_STORE_DSN="x",
    )
    expected = {
        "typo", "upstrem", "listen.workers", "listen.adress", "store.dsn_file", "log.level", "KEYPROXY_STORE_DSN",
        "routes[1].match", "routes[2].scopes", "routes[2]",
    }  # fmt: skip
    assert {problem.partition(": ")[0] for problem in problems} == expected


def test_everything_is_shown_in_the_order_of_the_file_with_routes_last(reader: Reader) -> None:
    settings = reader.load(EXAMPLE_WITH_ROUTE).settings
    shown: dict[str, Any] = dict(loader.flatten(settings))
    assert list(shown) == [
        *map(".".join, DEFAULTS), "models[1]", "categories[1]", "tools[1]", "providers[1]",
        *(f"oauth.known_clients[{number}]" for number in range(1, 6)), "routes[1]",
    ]  # fmt: skip
    assert [shown[".".join(key)] for key in DEFAULTS] == list(DEFAULTS.values())
    assert shown["routes[1]"] == dataclasses.asdict(settings.routes[0])


@pytest.mark.parametrize("table", ["reminders", "alerts"])
@pytest.mark.parametrize("url", ["https://h/hook?a=b", "http://localhost:1/", "http://127.0.0.9/", "http://[::1]:1/"])
def test_a_webhook_needs_a_secret(reader: Reader, url: str, table: str) -> None:
    text = f'[{table}]\nwebhook_url = "{url}"\n'
    (problem,) = reader.wrong(text)
    assert problem.startswith(f"{table}.webhook_secret: is required with {table}.webhook_url")
    settings = reader.load(f'{text}webhook_secret = "whsec_{"YWJj" * 8}"').settings
    assert getattr(settings, table).webhook_url == url


@pytest.mark.parametrize("number", ["1000000000000000", "9" * 18, "9" * 30, "9" * 5000])
def test_a_number_that_is_too_large_is_reported_as_such(reader: Reader, number: str) -> None:
    for variable in (
        "KEYPROXY_LISTEN__CONNECTIONS_MAX",
        "KEYPROXY_CACHE__FRESH_SECONDS",
        "KEYPROXY_REMINDERS__BEFORE_DAYS",
    ):
        (problem,) = reader.wrong(**{variable: number})
        assert "too large" in problem or "list of whole numbers" in problem
    if len(number) < 4000:
        (problem,) = reader.wrong(f"[listen]\nconnections_max = {number}")
        assert "listen.connections_max: is too large" in problem


def test_a_number_above_the_general_bound_is_reported_as_too_large(reader: Reader) -> None:
    (problem,) = reader.wrong("[listen]\nconnections_max = 10000000000000")
    assert "is too large: at most 1000000000000" in problem
    (problem,) = reader.wrong("[listen]\nconnections_max = 0")
    assert "must be at least 1 " in problem
    (problem,) = reader.wrong("[cache]\nfresh_seconds = nan")
    assert "must be a number" in problem


def test_contradictory_configuration_can_still_be_displayed(reader: Reader) -> None:
    with pytest.raises(ConfigError) as error:
        reader.load("[cache]\nfresh_seconds = 5\nstale_seconds = 1")
    assert error.value.loaded is not None
    assert error.value.loaded.settings.cache.stale_seconds == 1
    with pytest.raises(ConfigError) as error:
        reader.load("[cache]\nfresh = 5")
    assert error.value.loaded is None
