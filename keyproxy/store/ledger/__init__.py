"""Where limits are accounted: the client, its backends, charges that count once."""
