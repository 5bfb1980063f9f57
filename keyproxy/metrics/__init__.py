"""Metrics and access log. Only this package imports prometheus_client."""
