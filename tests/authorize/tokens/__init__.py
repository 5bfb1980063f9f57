"""The endpoints for tokens."""
