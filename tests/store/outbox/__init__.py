"""Outboxes in the store."""
