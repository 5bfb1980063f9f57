"""Signals that a key behaves unlike itself."""
