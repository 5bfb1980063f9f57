"""keyproxy oauth."""
