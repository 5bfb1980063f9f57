"""keyproxy migrate."""

from __future__ import annotations

from pathlib import Path

import click
import orjson
import uvloop

from keyproxy.cli.options import NoDatabase, config_option, json_option, load, store
from keyproxy.cli.output import print_message
from keyproxy.config.oauth.oauth_settings import CREATE
from keyproxy.store.postgres import migrations, roles


@click.command("migrate")
@config_option
@json_option
@click.option("--status", "only_status", is_flag=True, help="List applied and pending migrations; change nothing.")
@click.option(
    "--roles",
    "prefix",
    metavar="PREFIX",
    help="Also create the database roles PREFIX_proxy, PREFIX_admin, PREFIX_authorize and PREFIX_app.",
)
def migrate_command(config_path: Path | None, prefix: str | None, *, as_json: bool, only_status: bool) -> None:
    """Migrate the database schema to this program's version.

    Safe to run at any time, concurrently, and while proxies of the previous release are running.

    --roles creates roles with the minimum privileges for proxies, for administration, for the authorization server, and
    for applications that manage their users and keys by SQL. Run it again after each upgrade to grant what the new schema
    needs, and when oauth.login.provision changes. The roles can log in once they have a password.

    \b
    keyproxy migrate --roles keyproxy
    psql -c '\\password keyproxy_proxy'
    psql -c 'GRANT keyproxy_app TO app'       the role that your application logs in with
    """
    if prefix is not None and only_status:
        raise click.UsageError("--status changes nothing: it cannot be combined with --roles")
    loaded = load(config_path)
    done, made = [], []
    try:
        with store(loaded, creates=not only_status) as dsn:
            if not only_status:
                done = uvloop.run(migrations.migrate(dsn))
            if prefix is not None:
                provisions = loaded.settings.oauth_login.provision == CREATE
                made = uvloop.run(roles.create(dsn, prefix, provisions=provisions))
            state = uvloop.run(migrations.state(dsn))
    except NoDatabase as error:
        print_message(f"{error}: everything is pending")
        state = migrations.State([], migrations.available())
    names = {one.number: f"{one.number:04}_{one.name}" for one in migrations.available()}
    if as_json:
        found = {
            "applied": [names[number] for number in state.applied],
            "pending": [names[one.number] for one in state.pending],
            "done": [names[one.number] for one in done],
            **({} if prefix is None else {"roles": list(roles.names(prefix)), "roles_made": made}),
        }
        click.echo(orjson.dumps(found).decode("utf-8"))
        return
    for one in done:
        click.echo(f"applied  {names[one.number]}")
    if only_status:
        for number, name in names.items():
            click.echo(f"{'applied' if number in state.applied else 'pending'}  {name}")
        return
    if prefix is not None:
        for role in roles.names(prefix):
            click.echo(f"{'created' if role in made else 'granted'}  {role}")
    elif not done:
        click.echo("nothing to do")
