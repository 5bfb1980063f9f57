"""Who used what: written in batches, read as sums and events."""
