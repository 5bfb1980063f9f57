"""An embedded PostgreSQL server, for evaluation and for single machines."""
