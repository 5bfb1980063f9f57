"""keyproxy: tells a compute server, for every request, on whose behalf it comes."""

__version__ = "0.1.0"
