"""Tenants, users, keys and plans, as operators change them."""
