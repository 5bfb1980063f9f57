"""keyproxy authorize."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click
import uvloop

from keyproxy.cli.options import check_addresses, check_schema, config_option, load, store
from keyproxy.config.loader import ConfigError
from keyproxy.config.schema import Settings
from keyproxy.platform import garbage

_log = logging.getLogger(__name__)


@click.command("authorize", short_help="Run the OAuth authorization server.")
@config_option
def authorize_command(config_path: Path | None) -> None:
    """Run the OAuth 2.1 authorization server: MCP clients connect users through the browser, and machines exchange a
    credential for tokens.

    Serves until SIGTERM: access log on stdout, everything else on stderr. SIGHUP reloads the configuration, the
    certificate and the secrets; addresses need a restart. /livez, /readyz and /metrics are on oauth.ops_address.
    """
    # These imports take longer than any other command runs.
    with garbage.importing():
        from keyproxy.authorize.app import AuthorizationServer, RejectedConfig
        from keyproxy.wire.tls import TlsError

    loaded = load(config_path, is_serving=True)
    settings = loaded.settings
    check_addresses(settings)

    def read_again() -> Settings:
        try:
            return load(config_path, is_serving=True).settings
        except ConfigError as error:
            raise RejectedConfig("; ".join(error.problems)) from error

    async def run(dsn: str) -> None:
        await check_schema(dsn)
        server = AuthorizationServer(settings, dsn)
        await server.run(access_log_fd=sys.stdout.fileno(), started=_started, read_again=read_again)

    with store(loaded) as dsn:
        try:
            uvloop.run(run(dsn))
        except (TlsError, RejectedConfig) as error:
            raise ConfigError([str(error)]) from error


def _started(addresses: str) -> None:
    _log.info("authorization server on %s", addresses)
