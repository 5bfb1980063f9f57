"""`keyproxy role` and `keyproxy owned`."""
