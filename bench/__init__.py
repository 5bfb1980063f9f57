"""Measurements. `python -m bench` compares; `python -m bench.phases` times the phases of one request."""
