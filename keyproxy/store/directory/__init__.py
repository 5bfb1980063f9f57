"""The directory: tenants, users, keys and plans, with their audit log."""
