"""A PostgreSQL server of our own, for trying things out and for single machines."""
