"""Signals of unusual use of a key, and the suspension of keys."""
