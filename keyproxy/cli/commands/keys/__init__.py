"""`keyproxy key`."""
