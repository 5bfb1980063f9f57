"""`keyproxy agent`."""
