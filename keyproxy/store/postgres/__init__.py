"""The one way to PostgreSQL: connections, statements, migrations."""
