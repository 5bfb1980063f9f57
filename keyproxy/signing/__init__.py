"""Signing keys, and what is signed with them: agent tokens and identity assertions."""
