"""Credentials of upstreams that are stored sealed, one set for each tenant and mode."""
