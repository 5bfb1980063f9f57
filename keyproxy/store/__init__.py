"""The store: PostgreSQL, identities, ledger, usage, directory. The only package that imports asyncpg and cachetools."""
