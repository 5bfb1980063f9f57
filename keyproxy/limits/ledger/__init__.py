"""The rules of the ledger: what it stores, what a message changes, and the pace of messages."""
