"""keyproxy config check|show|example."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click
import orjson

from keyproxy.cli.options import config_option, json_option, load
from keyproxy.config import loader
from keyproxy.config.access_settings import model_warnings
from keyproxy.config.oauth import oauth_checks
from keyproxy.config.route_review import cap_warnings, certificate_warnings


@click.group("config", short_help="Check or show the configuration, or print an example.")
def config_group() -> None:
    """Check the configuration, show its effective values, or print an example."""


@config_group.command("check", short_help="Check whether the configuration can be used.")
@config_option
@click.option("--offline", is_flag=True, help="Do not connect to the database.")
def check(config_path: Path | None, *, offline: bool) -> None:
    """Check the configuration: its keys, certificates, routes, and the database.

    Status 0 if it is usable; otherwise 2, with one line per problem. An embedded database that does not exist yet is not
    a problem: `serve` creates it.
    """
    # These imports take longer than all of `show`.
    from keyproxy.cli import config_checks

    wrong: list[str] = []
    loaded: loader.Config | None
    try:
        loaded = load(config_path)
    except loader.ConfigError as error:
        wrong += error.problems
        loaded = error.loaded
    if loaded is not None:
        wrong += config_checks.problems(loaded, offline=offline)
    if wrong:
        # Loading also finds address overlaps that need no name lookup.
        raise loader.ConfigError(list(dict.fromkeys(wrong)))
    if loaded is not None:
        settings = loaded.settings
        warnings = [*cap_warnings(settings.routes), *model_warnings(settings), *certificate_warnings(settings)]
        warnings += oauth_checks.warnings(settings)
        for warning in warnings:
            click.echo(f"warning: {warning}", err=True)
    click.echo("ok")


@config_group.command("show")
@config_option
@json_option
def show(config_path: Path | None, *, as_json: bool) -> None:
    """Show every value and where it came from. Secrets are masked."""
    loaded = load(config_path)
    rows = []
    for key, value in loader.flatten(loaded.settings):
        origin = loaded.origins.get(key)
        source = origin.source if origin is not None else "file or KEYPROXY_ROUTES"
        rows.append((key, loader.mask(value) if origin is not None and origin.secret else value, source))
    if as_json:
        found = {key: {"value": value, "source": source} for key, value, source in rows}
        click.echo(orjson.dumps(found).decode("utf-8"))
        return
    width = max(len(key) for key, *_ in rows)
    for key, value, source in rows:
        shown = orjson.dumps(value).decode("utf-8")
        click.echo(f"{key:<{width}} = {shown}  # {source}")


@config_group.command("example", short_help="Print a file with every key and its default.")
@config_option
def example(config_path: Path | None) -> None:
    """Print an example configuration file with every key and its default.

    \b
    keyproxy config example > keyproxy.toml
    """
    del config_path  # every command accepts --config
    click.echo(resources.files("keyproxy").joinpath("config.example.toml").read_text(encoding="utf-8"), nl=False)
