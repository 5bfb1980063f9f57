"""Approvals and consents in the store."""
