"""The configuration: schema, loading and checks."""
