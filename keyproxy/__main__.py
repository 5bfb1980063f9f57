"""`python -m keyproxy`, and the console script."""

from __future__ import annotations

import sys

from keyproxy.platform import standard_streams
from keyproxy.process import health_probe


def main() -> None:
    """Run the command line and exit with its status."""
    standard_streams.open_missing()
    arguments = sys.argv[1:]
    if health_probe.is_plain(arguments):
        # A container's health check runs every few seconds: it loads only what it needs.
        sys.exit(health_probe.main(arguments))
    from keyproxy import cli

    sys.exit(cli.main())


if __name__ == "__main__":
    main()
