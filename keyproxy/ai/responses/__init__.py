"""Read the usage that a response reports."""
