"""Changes to plans."""
