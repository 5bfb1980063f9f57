"""`python -m keyproxy`, and the console script."""

from __future__ import annotations

import sys

from keyproxy import cli


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
