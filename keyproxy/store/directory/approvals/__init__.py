"""Approvals of calls and consents of users, as operators decide, grant and revoke them."""
