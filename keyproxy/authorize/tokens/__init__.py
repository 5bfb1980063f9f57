"""The endpoints for tokens: they are issued, refreshed, revoked and introspected here."""
