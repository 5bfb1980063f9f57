"""Upstream connections: the pool, how it is shared, how a request is written."""
