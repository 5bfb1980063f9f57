"""The control plane: the admin API, its schemas, authentication and scopes, and the reminder sender."""
