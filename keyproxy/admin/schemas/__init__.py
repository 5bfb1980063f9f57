"""What the admin API accepts and returns."""
