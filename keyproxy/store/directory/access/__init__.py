"""What keys may do: roles, and the ids that tenants own."""
