"""Counting and logging: the catalogue of metrics, the recorder, the access log. The only home of prometheus_client."""
