"""The APIs of AI upstreams as one table: a new dialect is one module here, and one line in `table`."""
