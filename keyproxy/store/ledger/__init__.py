"""The accounting of limits: the ledger client, its backends, and the deduplication of charges."""
