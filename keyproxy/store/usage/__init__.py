"""Usage by key: written in batches, read as sums and events."""
