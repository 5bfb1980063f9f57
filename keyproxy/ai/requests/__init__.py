"""Read the token bounds of a request without keeping its body."""
