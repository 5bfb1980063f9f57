"""Access to PostgreSQL: connections, statements, migrations, roles."""
