"""Identity on incoming requests: which requests to trust, what their headers state, and the response without it."""
