"""keyproxy: a reverse proxy that authenticates requests and identifies the user to the compute server behind it."""

__version__ = "0.1.0"
