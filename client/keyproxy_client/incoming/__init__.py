"""Identity on incoming requests: which requests to trust, what their headers state, and what to answer without it."""
