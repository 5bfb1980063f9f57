"""Keys on the user page of Django's admin: a read-only list, and the actions issue, rotate and revoke."""
