"""Approvals and consents: claimed by one request, given back if nothing was sent."""
