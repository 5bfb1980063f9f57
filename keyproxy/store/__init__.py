"""PostgreSQL: the pool, the keys, the identity cache, the change feed. The only home of asyncpg and cachetools."""
