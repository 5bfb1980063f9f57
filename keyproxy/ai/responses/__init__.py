"""Read what a response used."""
