"""The directory over the admin API, for commands with --admin-url."""
