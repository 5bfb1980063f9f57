"""Signals of unusual use of a key."""
