"""Agent tokens in the store: minting, and deleting what ended."""
