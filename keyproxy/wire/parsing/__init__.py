"""Heads and framing of HTTP/1.1. Sans I/O."""
