"""Which key is whose: the cache, its lookups, and the feed of changes."""
