"""Resolving keys to identities: the cache, its lookups, and the change feed."""
