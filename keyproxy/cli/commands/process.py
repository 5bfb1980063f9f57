"""keyproxy drain, keyproxy health: commands for a running process of this configuration."""

from __future__ import annotations

from pathlib import Path

import click
import orjson

from keyproxy.cli.options import config_option, json_option, load
from keyproxy.cli.output import Failure, print_message
from keyproxy.config.loader import ConfigError
from keyproxy.platform import process_registry
from keyproxy.platform.process_registry import Running
from keyproxy.process import health_probe


@click.command("drain", short_help="Drain and stop a running proxy, as SIGTERM does.")
@click.option("--wait", "waits", is_flag=True, help="Return when the process has drained and exited.")
@click.option("--pid", type=int, help="The process to drain, if several share the address.")
@config_option
@json_option
def drain_command(config_path: Path | None, pid: int | None, *, waits: bool, as_json: bool) -> None:
    """Shut a running proxy down gracefully, as SIGTERM does: it is no longer ready, refuses new connections after
    listen.linger_seconds, and has up to listen.drain_seconds for requests in flight.

    Finds the `keyproxy serve` of this user that listens on the configuration's listen.address; without a configuration,
    the only one on this machine, as in a container. Status 1 if there is none.

    \b
    keyproxy drain --config keyproxy.toml --wait
    """
    one = _chosen(config_path, pid)
    sock = process_registry.connected(one.name)
    if sock is None:
        raise Failure("the proxy has already exited")
    with sock:
        try:
            sock.sendall(process_registry.DRAIN)
            reply = sock.recv(64)
            if not reply.startswith(process_registry.DRAINING):
                raise Failure(f"the proxy (pid {one.pid}) does not respond")
            if waits:
                sock.settimeout(None)
                while chunk := sock.recv(64):
                    reply += chunk
                if reply != process_registry.DRAINING + process_registry.DRAINED:
                    raise Failure(f"the proxy (pid {one.pid}) exited before it had drained")
        except OSError as error:
            raise Failure(f"the proxy (pid {one.pid}) does not respond: {error}") from error
    if as_json:
        click.echo(orjson.dumps({"pid": one.pid, "draining": True, "drained": waits}).decode())
    else:
        print_message(f"the proxy (pid {one.pid}) {'has drained and exited' if waits else 'is draining and will exit'}")


@click.command("health", short_help="Exit with 0 if the running process is live.")
@config_option
@json_option
def health_command(config_path: Path | None, *, as_json: bool) -> None:
    """Check whether the running `keyproxy serve`, `admin` or `authorize` of this configuration is live, for health checks
    of containers.

    Status 0 if its event loop responds; 1 if there is no such process, or it does not respond. Without a configuration it
    checks all that run here, as in a container. It does not check readiness; for that see /readyz of the ops listener.
    """
    try:
        found = health_probe.check("" if config_path is None else str(config_path))
    except health_probe.NotLive as error:
        raise Failure(str(error)) from error
    except health_probe.Misused as error:
        raise ConfigError(error.problems) from error
    live = [{"command": one.presence.purpose, "pid": one.pid} for one in found]
    if as_json:
        click.echo(orjson.dumps({"live": live}).decode())
    else:
        print_message(health_probe.described(found))


def _chosen(config_path: Path | None, pid: int | None) -> Running:
    where = "here"
    if config_path is None:
        found = process_registry.here(process_registry.SERVE)
    else:
        settings = load(config_path).settings
        where = f"on {settings.listen.address}"
        try:
            found = process_registry.of_addresses({process_registry.SERVE: settings.listen.address})
        except OSError as error:
            raise Failure(f"{settings.listen.address}: {error.strerror or error}") from error
        # Containers that share a network namespace each see only their own processes.
        found = [one for one in found if one.pid] or found
    chosen = found if pid is None else [one for one in found if one.pid == pid]
    if not chosen:
        which = "" if pid is None else f" with pid {pid}"
        raise Failure(f"no proxy of this user{which} runs {where}")
    if len(chosen) > 1:
        pids = ", ".join(str(one.pid) for one in chosen)
        raise Failure(f"{len(chosen)} proxies run {where}: choose one with --pid, of {pids}")
    return chosen[0]
