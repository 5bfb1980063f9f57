"""The life of the keys that a process signs with: made, published, replaced, cut."""
