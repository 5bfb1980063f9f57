"""Signals that a key behaves unlike itself, and the suspension of keys."""
